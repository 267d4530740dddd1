"""What the capture said of a cache: whether it is as close to its teacher as the teacher is to itself.

Capture scores some committed units again on the live engine and writes down how far the cache is from it, and how far
from it the engine itself and the codec are (`actors/faithfulness.py`). Here lies the record, and here it is read:
`admission` refuses an unfaithful cache, `verify` reports it, and a cache without a verdict has not been checked.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.cache.storage import layout
from pipeline.cache.storage.store import Store
from pipeline.errors import DamageError


@dataclass(frozen=True, slots=True)
class Distance:
    """One way of being different, as means over positions; in nats or as a share, as its name says."""

    live_vs_cache: float
    """What a student that trains on the cache is told wrongly."""
    live_vs_live: float
    """The engine's own noise."""
    codec: float
    """What encoding and decoding alone take."""
    allowed: float
    """The most that `live_vs_cache` may be."""

    @property
    def within(self) -> bool:
        """Whether it is what is allowed."""
        return math.isfinite(self.live_vs_cache) and self.live_vs_cache <= self.allowed


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `faithfulness.json` holds."""

    usable: bool
    positions: int
    """That were compared."""
    units: tuple[str, ...]
    """That they are from."""
    distances: Mapping[str, Distance]
    """By name; a usable cache is within every one."""
    why: str
    """In words, with the figures."""

    def to_bytes(self) -> bytes:
        """The file."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()


def read_verdict(store: Store) -> Verdict | None:
    """The capture's verdict, None where nobody has compared. Raises DamageError."""
    data = store.read_if_present(layout.FAITHFULNESS_JSON)
    if data is None:
        return None
    try:
        return _parse(json.loads(data))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamageError(f"{store.where(layout.FAITHFULNESS_JSON)}: not what was written: {error!r}") from error


def _parse(record: dict[str, Any]) -> Verdict:
    usable, positions, why = record["usable"], record["positions"], record["why"]
    if not (isinstance(usable, bool) and isinstance(positions, int) and isinstance(why, str)):
        raise TypeError("expected usable, positions and why of their types")
    distances = {name: _distance(figures) for name, figures in record["distances"].items()}
    if usable and not (positions and distances and all(distance.within for distance in distances.values())):
        raise ValueError("it calls usable what its own figures do not")
    return Verdict(usable, positions, tuple(record["units"]), distances, " ".join(why.split()))


def _distance(figures: dict[str, Any]) -> Distance:
    if not all(isinstance(figure, float | int) for figure in figures.values()):
        raise TypeError("expected distances in numbers")
    return Distance(**figures)
