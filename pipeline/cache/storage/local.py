"""Storage backend for a folder of a local or mounted file system, with atomic and durable writes."""

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from pipeline.cache.storage.layout import TEMPORARY_PREFIX


class LocalFolder:
    """Files under one root. Implements `store.Backend`; raises OSError."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, path: str) -> bytes:
        """Return the file's content."""
        return self._absolute(path).read_bytes()

    def replace(self, path: str, data: bytes, midway: Callable[[], None]) -> None:
        """Write `data` to a temporary file, sync it, and rename it to `path`."""
        target = self._absolute(path)
        with self._temporary_file(target, data, midway) as temporary:
            temporary.replace(target)

    def create(self, path: str, data: bytes, midway: Callable[[], None]) -> None:
        """Write `data` to `path`. Raises FileExistsError if there is a file."""
        target = self._absolute(path)
        with self._temporary_file(target, data, midway) as temporary:
            target.hardlink_to(temporary)  # a rename would replace the file of a concurrent writer

    def exists(self, path: str) -> bool:
        """Return whether `path` is a file."""
        return self._absolute(path).is_file()

    def files(self, prefix: str, *, temporary: bool = False) -> Iterator[str]:
        """Yield the paths of finished files (or of temporary ones) below a folder, in any order."""
        for folder, _, names in os.walk(self._absolute(prefix) if prefix else self.root, onerror=_raise_unless_absent):
            for name in names:
                if name.startswith(TEMPORARY_PREFIX) == temporary:
                    yield Path(folder, name).relative_to(self.root).as_posix()

    def delete(self, path: str) -> None:
        """Delete the file if it exists."""
        self._absolute(path).unlink(missing_ok=True)

    def size(self, path: str) -> int:
        """Return the file's size in bytes."""
        return self._absolute(path).stat().st_size

    def modified_s(self, path: str) -> float:
        """Return the time of the last modification, in seconds since 1970."""
        return self._absolute(path).stat().st_mtime

    @cached_property
    def _real_root(self) -> Path:
        return self.root.resolve()

    def _absolute(self, path: str) -> Path:
        absolute = self.root / path
        if not absolute.resolve().is_relative_to(self._real_root):
            raise PermissionError(f"a symbolic link points outside {self.root}")
        return absolute

    @contextmanager
    def _temporary_file(self, target: Path, data: bytes, midway: Callable[[], None]) -> Iterator[Path]:
        _make_folder(target.parent)
        temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        try:
            _write_and_sync(temporary, data, midway)
            yield temporary
            _sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _write_and_sync(path: Path, data: bytes, midway: Callable[[], None]) -> None:
    half = len(data) // 2
    with path.open("xb") as file:
        file.write(memoryview(data)[:half])
        file.flush()
        midway()
        file.write(memoryview(data)[half:])
        file.flush()
        os.fsync(file.fileno())


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents, each synced into its parent's directory entry."""
    if folder.is_file():
        raise NotADirectoryError(errno.ENOTDIR, "expected a folder, got a file", str(folder))
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some mounted stores cannot sync folders
            raise
    finally:
        os.close(descriptor)
