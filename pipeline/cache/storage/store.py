"""A store: one folder or object-store prefix, addressed by URI, with operations on whole files.

Files are not streamed to their final name: a writer that died would publish an incomplete file.
"""

import errno
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

from pipeline.cache.storage.failures import failure_types, status_of
from pipeline.cache.storage.layout import check_path
from pipeline.cache.storage.local import LocalFolder
from pipeline.errors import StorageError

Paths: TypeAlias = list[str]

_READ_THREADS = 16


class Backend(Protocol):
    """Operations of one kind of storage. Paths are already checked; raises any of `failures.failure_types`."""

    def read(self, path: str) -> bytes: ...  # noqa: D102
    def replace(self, path: str, data: bytes, midway: Callable[[], None]) -> None: ...  # noqa: D102
    def create(self, path: str, data: bytes, midway: Callable[[], None]) -> None: ...  # noqa: D102
    def exists(self, path: str) -> bool: ...  # noqa: D102
    def files(self, prefix: str, *, temporary: bool = False) -> Iterator[str]: ...  # noqa: D102
    def delete(self, path: str) -> None: ...  # noqa: D102
    def size(self, path: str) -> int: ...  # noqa: D102
    def modified_s(self, path: str) -> float: ...  # noqa: D102


@dataclass(frozen=True)
class Store:
    """Files by relative path under one URI. Every failure is a StorageError with path and errno or HTTP status.

    Created by `Store.open`. Can be pickled: other processes open their own connections.
    """

    uri: str
    _backend: Backend = field(repr=False, compare=False)

    @staticmethod
    def open(uri: "str | Path | Store") -> "Store":
        """Return the store at a local path, which becomes absolute, or at a URI of fsspec. Creates nothing."""
        if isinstance(uri, Store):
            return uri
        text = str(uri)
        if "://" in text and not text.startswith("file://"):
            from pipeline.cache.storage.remote import ObjectStore  # takes 0.1 s: fsspec, tenacity

            return Store(text.rstrip("/"), ObjectStore(text))
        if not text or "\0" in text:
            raise StorageError(f"storage {text!r}: expected a path or a URI")
        root = Path(text.removeprefix("file://")).expanduser().absolute()
        return Store(str(root), LocalFolder(root))

    def __reduce__(self) -> "tuple[Callable[[str], Store], tuple[str]]":
        """Pickle the URI alone, since connections cannot be shared between processes."""
        return Store.open, (self.uri,)

    def child(self, name: str) -> "Store":
        """Return the store in a subfolder."""
        return Store.open(f"{self.uri}/{check_path(name)}")

    def local_path(self) -> Path | None:
        """Return the local folder; None for an object store."""
        return self._backend.root if isinstance(self._backend, LocalFolder) else None

    def where(self, path: str) -> str:
        """Return the absolute URI of a path."""
        return f"{self.uri}/{path}"

    def read(self, path: str) -> bytes:
        """Return the file's content."""
        with self._operation("read", path):
            return self._backend.read(path)

    def read_if_present(self, path: str) -> bytes | None:
        """Return the file's content; None if there is no file."""
        with self._operation("read", path):
            try:
                return self._backend.read(path)
            except FileNotFoundError:
                return None

    def read_many(self, paths: Sequence[str]) -> list[bytes]:
        """Return the contents of many small files, in the order of `paths`, read concurrently."""
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            return list(pool.map(self.read, paths))

    def put(self, path: str, data: bytes, *, midway: Callable[[], None] = lambda: None) -> None:
        """Write a file atomically: readers see the old content or the new one, also after a crash.

        `midway` is called when half of the bytes are written (before the PUT to an object store), for fault injection.
        """
        with self._operation("write", path):
            self._backend.replace(path, data, midway)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Create a file unless it exists; of concurrent callers exactly one content is stored.

        Returns True if the file now holds exactly `data`, by this call or an equal one before it (a lost response, a
        repeated attempt), and False if it holds other data. Callers that need to be distinct put an id in `data`.
        """
        with self._operation("create", path):
            try:
                self._backend.create(path, data, lambda: None)
            except FileExistsError:
                return self._backend.read(path) == data
        return True

    def exists(self, path: str) -> bool:
        """Return whether `path` is a file."""
        with self._operation("check", path):
            return self._backend.exists(path)

    def list(self, prefix: str = "") -> Paths:
        """Return the sorted paths of the finished files below a folder; empty if there is no such folder."""
        return self._files(prefix, temporary=False)

    def temporary_files(self) -> Paths:
        """Return the sorted paths of files that a writer has begun and not finished."""
        return self._files("", temporary=True)

    def delete(self, path: str) -> None:
        """Delete the file if it exists."""
        with self._operation("delete", path, temporary=True):
            self._backend.delete(path)

    def size(self, path: str) -> int:
        """Return the file's size in bytes."""
        with self._operation("inspect", path, temporary=True):
            return self._backend.size(path)

    def modified_s(self, path: str) -> float:
        """Return the time of the last write by the storage's clock, in seconds since 1970."""
        with self._operation("inspect", path, temporary=True):
            return self._backend.modified_s(path)

    def _files(self, prefix: str, *, temporary: bool) -> Paths:
        if prefix:
            check_path(prefix)
        with self._failures_as_storage_errors("list", prefix):
            return sorted(self._backend.files(prefix, temporary=temporary))

    @contextmanager
    def _operation(self, verb: str, path: str, *, temporary: bool = False) -> Iterator[None]:
        check_path(path, temporary=temporary)
        with self._failures_as_storage_errors(verb, path):
            yield

    @contextmanager
    def _failures_as_storage_errors(self, verb: str, path: str) -> Iterator[None]:
        try:
            yield
        except failure_types() as error:
            raise StorageError(f"cannot {verb} {self.where(path)}: {_describe(error)}") from error


def _describe(error: Exception) -> str:
    """Return one line: the message, with errno and HTTP status if they are known."""
    number, message = (error.errno, error.strerror) if isinstance(error, OSError) else (None, None)
    status = status_of(error)
    codes = [] if status is None else [f"status {status}"]
    if number is not None:
        codes.append(f"errno {number} {errno.errorcode.get(number, '?')}")
    text = " ".join((message or str(error)).split())
    return f"{text} ({', '.join(codes) or type(error).__name__})"
