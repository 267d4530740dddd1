"""The record `faithfulness.json`: whether the cache agrees with the live teacher within the engine's own noise.

Capture scores some committed units a second time and measures three distances: live engine to cache, live engine to
itself, and the codec's error. `admission` refuses a cache whose record is negative, `verify` reports it, and a cache
without the record has not been compared.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.cache.damage import damage_if_invalid
from pipeline.cache.storage import layout
from pipeline.cache.storage.store import Store


@dataclass(frozen=True, slots=True)
class Distance:
    """One measure of difference, as means over positions; its name ends in the unit (`_nats`, `_share`)."""

    live_vs_cache: float
    """Between the live engine and the cache: the error of what a student trains on."""
    live_vs_live: float
    """Between two runs of the live engine: its noise."""
    codec: float
    """Between a signal and its encoded and decoded copy."""
    allowed: float
    """Upper bound of `live_vs_cache`."""

    @property
    def within(self) -> bool:
        """Whether `live_vs_cache` is finite and at most `allowed`."""
        return math.isfinite(self.live_vs_cache) and self.live_vs_cache <= self.allowed


@dataclass(frozen=True, slots=True)
class Verdict:
    """The content of `faithfulness.json`."""

    usable: bool
    positions: int
    """Number of positions compared."""
    units: tuple[str, ...]
    """Units of these positions."""
    distances: Mapping[str, Distance]
    """By name. All of them are `within` where the cache is usable."""
    why: str
    """One-line explanation with the figures."""

    def to_bytes(self) -> bytes:
        """Serialise as JSON."""
        return (json.dumps(asdict(self), indent=2) + "\n").encode()


def read_verdict(store: Store) -> Verdict | None:
    """Read the record; None where the cache was not compared. Raises DamageError where it is invalid."""
    data = store.read_if_present(layout.FAITHFULNESS_JSON)
    if data is None:
        return None
    with damage_if_invalid(store.where(layout.FAITHFULNESS_JSON)):
        return _parse(json.loads(data))


def _parse(record: dict[str, Any]) -> Verdict:
    usable, positions, why = record["usable"], record["positions"], record["why"]
    if not (isinstance(usable, bool) and isinstance(positions, int) and isinstance(why, str)):
        raise TypeError("usable, positions, why: expected a bool, an integer and a string")
    distances = {name: _parse_distance(figures) for name, figures in record["distances"].items()}
    if usable and not (positions and distances and all(distance.within for distance in distances.values())):
        raise ValueError("usable: expected false, since a distance is missing or above its allowed value")
    return Verdict(usable, positions, tuple(record["units"]), distances, " ".join(why.split()))


def _parse_distance(figures: dict[str, Any]) -> Distance:
    if not all(isinstance(figure, float | int) for figure in figures.values()):
        raise TypeError("distances: expected numbers")
    return Distance(**figures)
