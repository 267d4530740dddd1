"""The error that a reader raises where a stored record cannot be parsed."""

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import DamageError


@contextmanager
def damage_if_invalid(record: str, remedy: str = "") -> Iterator[None]:
    """Convert parse errors into `DamageError("<record>: invalid content: <reason>; <remedy>")`."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"expected a field {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise DamageError(f"{record}: invalid content: {reason}{remedy and f'; {remedy}'}") from error
