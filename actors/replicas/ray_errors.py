"""Turns what Ray raises for a failed call into one exception with a one-line message."""

from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from pipeline.errors import EngineDead, EngineError, StillhouseError


class ReplicaDied(Exception):
    """The actor's process or its engine died during a call. Another process may serve the call."""

    def __init__(self, message: str, *, reported: bool = False, permanent: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.reported = reported
        """The actor itself said that its engine died during this call."""
        self.permanent = permanent
        """Ray does not restart the actor."""


def result_of(ref: Any, teacher: str) -> Any:
    """The result of a finished call. Raises ReplicaDied, and StillhouseError where no other process could do better."""
    try:
        return ray.get(ref)
    except EngineDead as error:
        raise ReplicaDied(str(_cause(error)), reported=True) from None
    except StillhouseError as error:
        raise _cause(error) from None
    except RayTaskError as error:
        raise EngineError(f"teacher {teacher}: {type(error.cause).__name__}: {error.cause}") from error
    except RayError as error:
        permanent = isinstance(error, RayActorError) and not isinstance(error, ActorUnavailableError)
        raise ReplicaDied(_cause_of_death(error), permanent=permanent) from error


def _cause(error: Exception) -> Exception:
    """The error that the actor raised: the text of a RayTaskError is a whole traceback."""
    return error.cause if isinstance(error, RayTaskError) else error


def _cause_of_death(error: RayError) -> str:
    """The one line of Ray's long message that names the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if "exit detail" in line or "dead because" in line or "killed" in line]
    cause = (causes or lines or [type(error).__name__])[0][:500]
    return f"killed for memory: {cause}" if isinstance(error, OutOfMemoryError) else cause
