"""What Ray says when a call fails, in one line, and what it means."""

from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError, RayTaskError


def cause_of(error: RayError) -> str:
    """Ray explains a death over many lines; the cause stands in one of them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "exit detail" in line or "dead because" in line or "killed" in line]
    cause = (telling or lines or [type(error).__name__])[0][:500]
    return f"killed for memory: {cause}" if isinstance(error, OutOfMemoryError) else cause


def is_for_good(error: RayError) -> bool:
    """Whether the actor will not come back by itself."""
    return isinstance(error, RayActorError) and not isinstance(error, ActorUnavailableError)


def said(error: BaseException) -> str:
    """The message itself: a RayTaskError's own text is a whole traceback."""
    return str(error.cause if isinstance(error, RayTaskError) else error)
