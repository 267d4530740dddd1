"""A prefix of an object store, through fsspec: whole objects in one PUT, and patience with passing failures.

The client library retries first, as its own settings say. What it gives up on is tried again here a few times if the
failure is on a short list of passing ones (throttling, server errors, lost connections), with full jitter.
"""

import importlib
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec

from pipeline.errors import StorageError

T = TypeVar("T")

ATTEMPTS = 4
LONGEST_WAIT_S = 4.0
_FIRST_WAIT_S = 0.25
_PASSING_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
_PASSING_ERRORS = {"EndpointConnectionError", "ConnectionClosedError", "ConnectTimeoutError", "ReadTimeoutError"}
_PRECONDITION_FAILED = 412
_EXTRAS = {"s3": "s3", "s3a": "s3"}
_ONE_PUT = {"chunksize": 5 << 30}
"""To s3fs: S3 takes 5 GiB in one PUT. It makes parts of much less, and those of a dead writer would stay for ever."""
_CLIENT_ERRORS = (
    ("botocore.exceptions", ("BotoCoreError", "ClientError")),
    ("aiohttp", ("ClientError",)),
    ("gcsfs.retry", ("HttpError",)),
    ("google.auth.exceptions", ("GoogleAuthError",)),
    ("azure.core.exceptions", ("AzureError",)),
)


class RemotePrefix:
    """Objects under one URI. Raises what the client raises; `storage.Store` turns that into words."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._one_put = _ONE_PUT if uri.partition("://")[0] in _EXTRAS else {}
        self._connect()

    def _connect(self) -> None:
        self._process = os.getpid()
        self._connected, self._root = _connect(self._uri)

    @property
    def _filesystem(self) -> Any:
        """The client; a forked process must not talk through its parent's."""
        if self._process != os.getpid():
            self._connect()
        return self._connected

    def read(self, path: str) -> bytes:
        """The whole object."""
        data: bytes = patiently(lambda: self._filesystem.cat_file(self._at(path)))
        return data

    def replace(self, path: str, data: bytes, midway: Callable[[], None]) -> None:
        """Put `data` under `path` with one PUT, whatever was there."""
        midway()
        try:
            patiently(lambda: self._filesystem.pipe_file(self._at(path), data, **self._one_put))
        except failure_types() as error:
            if self._found_despite(error, path) != data:
                raise

    def create(self, path: str, data: bytes, midway: Callable[[], None]) -> None:
        """Put `data` under `path` unless something is there: FileExistsError.

        A PUT whose answer was lost and that was sent again ends here too: the caller compares contents.
        """
        midway()
        try:
            patiently(lambda: self._filesystem.pipe_file(self._at(path), data, mode="create", **self._one_put))
        except failure_types() as error:
            refused = isinstance(error, FileExistsError) or status_of(error) == _PRECONDITION_FAILED
            if refused or self._found_despite(error, path) is not None:
                raise FileExistsError(path) from error
            raise

    def _found_despite(self, error: Exception, path: str) -> bytes | None:
        """What is there after a PUT that seems to have failed: perhaps only its answers were lost."""
        try:
            found: bytes | None = self._filesystem.cat_file(self._at(path)) if _is_passing(error) else None
        except failure_types():
            return None
        return found

    def exists(self, path: str) -> bool:
        """Whether an object is there."""
        try:
            return bool(patiently(lambda: self._filesystem.info(self._at(path)))["type"] == "file")
        except FileNotFoundError:
            return False

    def files(self, prefix: str, *, temporary: bool = False) -> Iterator[str]:
        """Paths of the objects below a prefix. None is ever temporary: a PUT is there in full or not at all."""
        folder = self._at(prefix) if prefix else self._root
        try:
            found = [] if temporary else patiently(lambda: self._filesystem.find(folder))
        except FileNotFoundError:
            found = []
        for name in found:
            yield name[len(self._root) :].lstrip("/")

    def delete(self, path: str) -> None:
        """Remove an object; nothing happens where there is none."""
        try:
            patiently(lambda: self._filesystem.rm_file(self._at(path)))
        except FileNotFoundError:
            return

    def size(self, path: str) -> int:
        """Bytes."""
        return int(patiently(lambda: self._filesystem.info(self._at(path)))["size"])

    def modified_s(self, path: str) -> float:
        """When the object was written, in seconds since 1970, by the store's clock."""
        return float(patiently(lambda: self._filesystem.modified(self._at(path))).timestamp())

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"


def patiently(call: Callable[[], T]) -> T:
    """The call's result; passing failures are waited out, `ATTEMPTS` calls in all."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return call()
        except failure_types() as error:
            if not _is_passing(error):
                raise
            time.sleep(random.uniform(0.0, min(LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt)))
    return call()


def failure_types() -> tuple[type[Exception], ...]:
    """What a store can raise: OSError, operations that its kind lacks, the errors of the clients that are loaded."""
    found: list[type[Exception]] = [OSError, NotImplementedError]
    for module, names in _CLIENT_ERRORS:
        if module in sys.modules:
            found += [getattr(sys.modules[module], name) for name in names]
    return tuple(found)


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind a failure, where there is one."""
    while error is not None:
        response: Any = getattr(error, "response", None)
        if isinstance(response, dict) and "ResponseMetadata" in response:
            return int(response["ResponseMetadata"].get("HTTPStatusCode", 0)) or None
        error = error.__cause__
    return None


def _is_passing(error: BaseException) -> bool:
    if isinstance(error, TimeoutError | ConnectionError) or type(error).__name__ in _PASSING_ERRORS:
        return True
    return status_of(error) in _PASSING_STATUS


def _connect(uri: str) -> tuple[Any, str]:
    """The file system without a cache of listings, and the prefix on it."""
    protocol = uri.partition("://")[0]
    try:
        filesystem, root = fsspec.url_to_fs(uri, use_listings_cache=False)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        install = f"pip install 'stillhouse[{extra}]'" if extra else f"install fsspec's package for {protocol}://"
        raise StorageError(f"storage {uri}: {error}; run: {install}") from error
    except ValueError as error:
        raise StorageError(f"storage {uri}: expected a path or a URI that fsspec knows, got {error}") from error
    if protocol in _EXTRAS:
        importlib.import_module("botocore.exceptions")
    return filesystem, str(root).rstrip("/")
