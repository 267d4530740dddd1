"""What the capture said of a cache: whether it is as close to its teacher as the teacher is to itself.

Capture scores some committed units again on the live engine and writes down how far the cache is from it, and how far
from it the engine itself and the codec are (`actors/faithfulness.py`). Here the verdict is read: `admission` refuses
an unfaithful cache, `verify` reports it, and a cache without a verdict has not been checked.
"""

import json
import math
from dataclasses import dataclass

from pipeline.cache import layout
from pipeline.cache.storage import Store
from pipeline.errors import DamageError


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `faithfulness.json` says, as far as a reader of the cache needs it. Means in nats a position."""

    usable: bool
    positions: int
    """That were compared."""
    live_vs_cache_nats: float
    """KL of the live teacher to the cache."""
    allowed_nats: float
    why: str
    """In words, with the figures."""


def read_verdict(store: Store) -> Verdict | None:
    """The capture's verdict, None where nobody has compared. Raises DamageError."""
    data = store.read_if_present(layout.FAITHFULNESS_JSON)
    if data is None:
        return None
    try:
        return _parse(json.loads(data))
    except (ValueError, TypeError, KeyError) as error:
        raise DamageError(f"{store.where(layout.FAITHFULNESS_JSON)}: not what was written: {error!r}") from error


def _parse(record: dict[str, object]) -> Verdict:
    usable, positions, why = record["usable"], record["positions"], record["why"]
    found, allowed = record["live_vs_cache_nats"], record["allowed_nats"]
    if not (isinstance(usable, bool) and isinstance(positions, int) and isinstance(why, str)):
        raise TypeError("expected usable, positions and why of their types")
    if not (isinstance(found, float | int) and isinstance(allowed, float | int)):
        raise TypeError("expected numbers of nats")
    if usable and not (positions and math.isfinite(found) and found <= allowed):
        raise ValueError("it calls usable what its own figures do not")
    return Verdict(usable, positions, float(found), float(allowed), " ".join(why.split()))
