"""Whether a cache is as close to its teacher as the teacher is to itself.

A few committed units are scored again on the live engine, twice, the second time row by row in reverse order, since
batching is where an engine's own noise comes from. Every one of `actors.distances` is then taken three times:

    live_vs_cache   from the live engine to the cache: what a student that trains on the cache is told wrongly
    live_vs_live    from the live engine to itself: its own noise
    codec           from the live engine to decode(encode(it)): what the codec takes, measured on the same rows

The cache is usable when, for each distance, live_vs_cache is at most `MARGIN` times the sum of the other two and what
`Allowance.floor` adds. A cache of wrong ids has hardly an entry in common with its teacher, one of another teacher
gives other labels other probabilities, one of other layers has other states: no single distance sees all of these.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from actors.distances import DISTANCES, distances
from pipeline.cache.faithfulness import Distance, Verdict
from pipeline.cache.format.codecs import decode_signals, encode_signals
from pipeline.cache.format.schema import ShardSpec
from pipeline.contracts import Engine, ScoredSequence, Signals

MARGIN = 3.0
"""A mean over some thousand noisy positions wanders; a wrong model or a wrong token is off by far more."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """How a distance is called, and what is allowed of it without any noise or loss."""

    title: str
    floor: float
    """An engine without noise and a codec without loss still round somewhere, and shares of few positions jump."""


ALLOWANCES = {
    "kl_nats": Allowance("live against cache", 1e-4),
    "label_nats": Allowance("log-probability of the label", 1e-3),
    "entropy_nats": Allowance("entropy", 1e-3),
    "top_share": Allowance("positions of another top entry", 0.05),
    "entry_share": Allowance("kept ids that the cache lacks", 0.02),
    "hidden_share": Allowance("error of hidden states", 0.01),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Sums over positions; divide by `positions` for means."""

    positions: int = 0
    sums_3M: NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, len(DISTANCES))))
    """Live against cache, live against live, codec; each with the M `DISTANCES`."""

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(self.positions + other.positions, self.sums_3M + other.sums_3M)


def compare_unit(engine: Engine, cached: Sequence[ScoredSequence], spec: ShardSpec) -> Comparison:
    """Score a unit's rows twice and hold them against what the cache holds. Raises EngineDead."""
    sequences = [row.sequence for row in cached]
    live = engine.score(sequences)
    again = [engine.score([sequence])[0] for sequence in reversed(sequences)][::-1]
    parts = zip(live, again, cached, strict=True)
    return sum((_compare(once, twice, row, spec) for once, twice, row in parts), Comparison())


def judge(comparisons: Iterable[Comparison], units: Sequence[str]) -> Verdict:
    """Whether the cache may be trained from, by the sample's means."""
    total = sum(comparisons, Comparison())
    means_3M = (total.sums_3M / max(total.positions, 1)).tolist()
    found = {name: _distance(name, *legs) for name, *legs in zip(DISTANCES, *means_3M, strict=True)}
    usable = bool(total.positions) and all(distance.within for distance in found.values())
    return Verdict(usable, total.positions, tuple(units), found, _why(found))


def _compare(live: Signals, again: Signals, cached: ScoredSequence, spec: ShardSpec) -> Comparison:
    stored = decode_signals(encode_signals(live, spec), len(cached.sequence.input_ids_N), spec)
    others = (cached.signals, again, stored)
    sums_3M = np.stack([distances(live, other, spec.capture.mode) for other in others])
    return Comparison(len(live.label_logprob_T), sums_3M)


def _distance(name: str, live_vs_cache: float, live_vs_live: float, codec: float) -> Distance:
    allowed = MARGIN * (live_vs_live + codec) + ALLOWANCES[name].floor
    return Distance(live_vs_cache, live_vs_live, codec, allowed)


def _why(found: dict[str, Distance]) -> str:
    """What is too far, with the figures; where nothing is, the divergence, and the others in short."""
    beyond = {name: distance for name, distance in found.items() if not distance.within}
    in_full = "; ".join(
        _in_full(name, distance) for name, distance in (beyond or {"kl_nats": found["kl_nats"]}).items()
    )
    if beyond:
        return in_full
    in_short = (
        f"{ALLOWANCES[name].title} {distance.live_vs_cache:.1e} of {distance.allowed:.1e}"
        for name, distance in found.items()
        if name != "kl_nats"
    )
    return f"{_in_full('kl_nats', found['kl_nats'])}; {', '.join(in_short)}"


def _in_full(name: str, distance: Distance) -> str:
    unit = " nats" if name.endswith("_nats") else ""
    relation = "within" if distance.within else "further from the teacher than"
    return (
        f"{ALLOWANCES[name].title} {distance.live_vs_cache:.2e}{unit}, {relation} {distance.allowed:.2e} "
        f"(engine's noise {distance.live_vs_live:.2e}, codec {distance.codec:.2e})"
    )
