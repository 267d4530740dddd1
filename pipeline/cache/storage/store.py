"""A store: one folder or object-store prefix, addressed by URI, with a handful of whole-file operations.

Nothing is streamed into a final name: a writer that dies half-way through an open object publishes the half.
"""

import errno
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeAlias

from pipeline.cache.storage.layout import check_path
from pipeline.cache.storage.local import LocalFolder
from pipeline.cache.storage.remote import RemotePrefix, failure_types, status_of
from pipeline.errors import StorageError

Paths: TypeAlias = list[str]

_READERS = 16


class Backend(Protocol):
    """What a kind of storage must offer. Paths are checked already; failures are the kind's own."""

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
    """Files by relative path under one URI. Every failure is a StorageError with its errno or status, and the path.

    Make one with `Store.open`. It can be pickled into other processes, which connect anew.
    """

    uri: str
    _backend: Backend = field(repr=False, compare=False)

    @staticmethod
    def open(uri: "str | Path | Store") -> "Store":
        """The store at a local path or any URI of fsspec. Local paths become absolute; nothing is created yet."""
        if isinstance(uri, Store):
            return uri
        text = str(uri)
        if "://" in text and not text.startswith("file://"):
            return Store(text.rstrip("/"), RemotePrefix(text))
        if not text or "\0" in text:
            raise StorageError(f"storage {text!r}: expected a path or a URI")
        root = Path(text.removeprefix("file://")).expanduser().absolute()
        return Store(str(root), LocalFolder(root))

    def __reduce__(self) -> "tuple[Callable[[str], Store], tuple[str]]":
        """Rebuild from the URI: connections do not cross processes."""
        return Store.open, (self.uri,)

    def child(self, name: str) -> "Store":
        """The store one or more names below this one."""
        return Store.open(f"{self.uri}/{check_path(name)}")

    def local_path(self) -> Path | None:
        """The folder, or None where the store is no local folder."""
        return self._backend.root if isinstance(self._backend, LocalFolder) else None

    def where(self, path: str) -> str:
        """A path as a user may paste it."""
        return f"{self.uri}/{path}"

    def read(self, path: str) -> bytes:
        """The whole file."""
        with self._worded("read", path):
            return self._backend.read(path)

    def read_if_present(self, path: str) -> bytes | None:
        """The whole file, or None where there is none."""
        with self._worded("read", path):
            try:
                return self._backend.read(path)
            except FileNotFoundError:
                return None

    def read_many(self, paths: Sequence[str]) -> list[bytes]:
        """Whole files, in the order asked, read side by side: for many small ones."""
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(self.read, paths))

    def put(self, path: str, data: bytes, *, midway: Callable[[], None] = lambda: None) -> None:
        """Replace a file atomically: readers see all of the old or all of the new, also after a crash.

        `midway` is called with half of the bytes written (before the PUT on an object store): tests die there.
        """
        with self._worded("write", path):
            self._backend.replace(path, data, midway)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Create a file; of several callers at once exactly one content stays.

        True: the file now holds exactly `data`, by this call or an equal one before it (an answer that was lost, a
        repeated attempt). False: it holds something else. Callers that must tell each other apart put that in `data`.
        """
        with self._worded("create", path):
            try:
                self._backend.create(path, data, lambda: None)
            except FileExistsError:
                return self._backend.read(path) == data
        return True

    def exists(self, path: str) -> bool:
        """Whether a file is there."""
        with self._worded("look for", path):
            return self._backend.exists(path)

    def list(self, prefix: str = "") -> Paths:
        """Sorted paths of the finished files below a folder; empty where there is no such folder."""
        return self._files(prefix, temporary=False)

    def leftovers(self) -> Paths:
        """Sorted paths of files that writers began and did not finish."""
        return self._files("", temporary=True)

    def delete(self, path: str) -> None:
        """Remove a file; nothing happens where there is none."""
        with self._worded("delete", path, unfinished=True):
            self._backend.delete(path)

    def size(self, path: str) -> int:
        """Bytes of a file."""
        with self._worded("look at", path, unfinished=True):
            return self._backend.size(path)

    def modified_s(self, path: str) -> float:
        """When a file was written, in seconds since 1970, by the storage's clock."""
        with self._worded("look at", path, unfinished=True):
            return self._backend.modified_s(path)

    def _files(self, prefix: str, *, temporary: bool) -> Paths:
        if prefix:
            check_path(prefix)
        with self._failures_worded("list", prefix):
            return sorted(self._backend.files(prefix, temporary=temporary))

    @contextmanager
    def _worded(self, verb: str, path: str, *, unfinished: bool = False) -> Iterator[None]:
        check_path(path, unfinished=unfinished)
        with self._failures_worded(verb, path):
            yield

    @contextmanager
    def _failures_worded(self, verb: str, path: str) -> Iterator[None]:
        try:
            yield
        except failure_types() as error:
            raise StorageError(f"cannot {verb} {self.where(path)}: {_describe(error)}") from error


def _describe(error: Exception) -> str:
    """One line: the cause in words, with errno and HTTP status where they are known."""
    number, words = (error.errno, error.strerror) if isinstance(error, OSError) else (None, None)
    status = status_of(error)
    codes = [] if status is None else [f"status {status}"]
    if number is not None:
        codes.append(f"errno {number} {errno.errorcode.get(number, '?')}")
    text = " ".join((words or str(error)).split())
    return f"{text} ({', '.join(codes) or type(error).__name__})"
