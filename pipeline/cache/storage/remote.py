"""Storage backend for a prefix of an object store, through fsspec: one PUT an object, retries of transient failures.

The client library retries first, by its own configuration. A failure that is still transient after that (throttling,
server errors, lost connections) is retried here, with exponential backoff and full jitter.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from pipeline.errors import StorageError

T = TypeVar("T")

ATTEMPTS = 4
MAX_WAIT_S = 4.0
_FIRST_WAIT_S = 0.25
_TRANSIENT_STATUS = {408, 409, 425, 429, 500, 502, 503, 504}
_TRANSIENT_ERRORS = {"EndpointConnectionError", "ConnectionClosedError", "ConnectTimeoutError", "ReadTimeoutError"}
_PRECONDITION_FAILED = 412
_EXTRAS = {"s3": "s3", "s3a": "s3"}
_ONE_PUT = {"chunksize": 5 << 30}
"""Argument of s3fs: S3 accepts 5 GiB in one PUT. By default s3fs uploads large objects in parts, and the parts of a
writer that dies stay in the bucket."""
_CLIENT_ERRORS = (
    ("botocore.exceptions", ("BotoCoreError", "ClientError")),
    ("aiohttp", ("ClientError",)),
    ("gcsfs.retry", ("HttpError",)),
    ("google.auth.exceptions", ("GoogleAuthError",)),
    ("azure.core.exceptions", ("AzureError",)),
)


class ObjectStore:
    """Objects under one URI. Implements `store.Backend`; raises the errors of `failure_types`."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._one_put = _ONE_PUT if uri.partition("://")[0] in _EXTRAS else {}
        self._connect()

    def _connect(self) -> None:
        self._process_id = os.getpid()
        self._client, self._root = _open_filesystem(self._uri)

    @property
    def _filesystem(self) -> Any:
        """The client of this process: a forked process cannot share its parent's connections."""
        if self._process_id != os.getpid():
            self._connect()
        return self._client

    def read(self, path: str) -> bytes:
        """Return the object's content."""
        return bytes(_with_retries(lambda: self._filesystem.cat_file(self._key(path))))

    def replace(self, path: str, data: bytes, midway: Callable[[], None]) -> None:
        """Write `data` to `path` with one PUT."""
        midway()
        try:
            _with_retries(lambda: self._filesystem.pipe_file(self._key(path), data, **self._one_put))
        except failure_types() as error:
            if self._stored_despite(error, path) != data:
                raise

    def create(self, path: str, data: bytes, midway: Callable[[], None]) -> None:
        """Write `data` to `path` with one PUT. Raises FileExistsError if there is an object.

        That object can be this call's own: a PUT whose response is lost is sent again. The caller compares contents.
        """
        midway()
        try:
            _with_retries(lambda: self._filesystem.pipe_file(self._key(path), data, mode="create", **self._one_put))
        except failure_types() as error:
            exists = isinstance(error, FileExistsError) or status_of(error) == _PRECONDITION_FAILED
            if exists or self._stored_despite(error, path) is not None:
                raise FileExistsError(path) from error
            raise

    def _stored_despite(self, error: Exception, path: str) -> bytes | None:
        """Return the object after a PUT that failed with a transient error, since only its response may be lost."""
        try:
            stored: bytes | None = self._filesystem.cat_file(self._key(path)) if _is_transient(error) else None
        except failure_types():
            return None
        return stored

    def exists(self, path: str) -> bool:
        """Return whether `path` is an object."""
        try:
            return bool(_with_retries(lambda: self._filesystem.info(self._key(path)))["type"] == "file")
        except FileNotFoundError:
            return False

    def files(self, prefix: str, *, temporary: bool = False) -> Iterator[str]:
        """Yield the paths of the objects below a prefix. None is temporary: a PUT is atomic."""
        folder = self._key(prefix) if prefix else self._root
        try:
            keys = [] if temporary else _with_retries(lambda: self._filesystem.find(folder))
        except FileNotFoundError:
            keys = []
        for key in keys:
            yield key[len(self._root) :].lstrip("/")

    def delete(self, path: str) -> None:
        """Delete the object if it exists."""
        try:
            _with_retries(lambda: self._filesystem.rm_file(self._key(path)))
        except FileNotFoundError:
            return

    def size(self, path: str) -> int:
        """Return the object's size in bytes."""
        return int(_with_retries(lambda: self._filesystem.info(self._key(path)))["size"])

    def modified_s(self, path: str) -> float:
        """Return the time of the last PUT by the store's clock, in seconds since 1970."""
        return float(_with_retries(lambda: self._filesystem.modified(self._key(path))).timestamp())

    def _key(self, path: str) -> str:
        return f"{self._root}/{path}"


def _with_retries(call: Callable[[], T]) -> T:
    """Return the call's result, after up to `ATTEMPTS` calls if it fails transiently; raise the last failure."""
    retrying = Retrying(
        retry=retry_if_exception(_is_transient),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=_FIRST_WAIT_S, max=MAX_WAIT_S),
        reraise=True,
    )
    return retrying(call)


def failure_types(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """Return every exception type that a backend raises (OSError, NotImplementedError, errors of imported clients).

    `others` are added to these.
    """
    types: list[type[Exception]] = [OSError, NotImplementedError, *others]
    for module, names in _CLIENT_ERRORS:
        if module in sys.modules:
            types += [getattr(sys.modules[module], name) for name in names]
    return tuple(types)


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status of an error or its causes; None if there is none."""
    while error is not None:
        response: Any = getattr(error, "response", None)
        if isinstance(response, dict) and "ResponseMetadata" in response:
            return int(response["ResponseMetadata"].get("HTTPStatusCode", 0)) or None
        error = error.__cause__
    return None


def _is_transient(error: BaseException) -> bool:
    if not isinstance(error, failure_types()):
        return False
    if isinstance(error, TimeoutError | ConnectionError) or type(error).__name__ in _TRANSIENT_ERRORS:
        return True
    return status_of(error) in _TRANSIENT_STATUS


def _open_filesystem(uri: str) -> tuple[Any, str]:
    """Return fsspec's file system, without its cache of listings, and the root on it."""
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
