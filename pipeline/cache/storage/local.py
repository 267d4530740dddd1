"""A folder of a local (or mounted) file system, written so that no crash leaves half a file under a final name."""

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from pipeline.cache.storage.layout import TEMPORARY_PREFIX


class LocalFolder:
    """Files under one root. Raises OSError; `storage.Store` turns that into words."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, path: str) -> bytes:
        """The whole file."""
        return self._at(path).read_bytes()

    def replace(self, path: str, data: bytes, midway: Callable[[], None]) -> None:
        """Put `data` under `path`, atomically and durably, whatever was there."""
        target = self._at(path)
        with self._staged(target, data, midway) as staged:
            staged.replace(target)

    def create(self, path: str, data: bytes, midway: Callable[[], None]) -> None:
        """Put `data` under `path` unless something is there: FileExistsError."""
        target = self._at(path)
        with self._staged(target, data, midway) as staged:
            target.hardlink_to(staged)  # a rename would replace what another writer has put meanwhile

    def exists(self, path: str) -> bool:
        """Whether a file is there."""
        return self._at(path).is_file()

    def files(self, prefix: str, *, temporary: bool = False) -> Iterator[str]:
        """Paths of the files below a folder: the finished ones, or those that a writer had not finished."""
        for folder, _, names in os.walk(self._at(prefix) if prefix else self.root, onerror=_raise_unless_absent):
            for name in names:
                if name.startswith(TEMPORARY_PREFIX) == temporary:
                    yield Path(folder, name).relative_to(self.root).as_posix()

    def delete(self, path: str) -> None:
        """Remove a file; nothing happens where there is none."""
        self._at(path).unlink(missing_ok=True)

    def size(self, path: str) -> int:
        """Bytes."""
        return self._at(path).stat().st_size

    def modified_s(self, path: str) -> float:
        """When the file was written, in seconds since 1970."""
        return self._at(path).stat().st_mtime

    @cached_property
    def _real_root(self) -> Path:
        return self.root.resolve()

    def _at(self, path: str) -> Path:
        full = self.root / path
        if not full.resolve().is_relative_to(self._real_root):
            raise PermissionError(f"a link leads out of {self.root}")
        return full

    @contextmanager
    def _staged(self, target: Path, data: bytes, midway: Callable[[], None]) -> Iterator[Path]:
        _make_folder(target.parent)
        staged = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        try:
            _write_durably(staged, data, midway)
            yield staged
            _sync_folder(target.parent)
        finally:
            staged.unlink(missing_ok=True)


def _write_durably(path: Path, data: bytes, midway: Callable[[], None]) -> None:
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
    if folder.is_file():
        raise NotADirectoryError(errno.ENOTDIR, "a file where a folder is needed", str(folder))
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some mounted stores have no folders to sync
            raise
    finally:
        os.close(descriptor)
