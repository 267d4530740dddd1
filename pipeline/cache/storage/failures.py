"""Exceptions that a storage backend raises. Imports no client library: a local store starts without one."""

import sys
from typing import Any

_CLIENT_ERRORS = (
    ("botocore.exceptions", ("BotoCoreError", "ClientError")),
    ("aiohttp", ("ClientError",)),
    ("gcsfs.retry", ("HttpError",)),
    ("google.auth.exceptions", ("GoogleAuthError",)),
    ("azure.core.exceptions", ("AzureError",)),
)


def failure_types(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """Return OSError, NotImplementedError, the error types of imported clients, and `others`."""
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
