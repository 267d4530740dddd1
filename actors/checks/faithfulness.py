"""Checks that a cache is as close to its teacher as the teacher is to itself.

A few committed units are scored again on the live engine, twice, the second time row by row in reverse order, since
batching is where an engine's numerical noise comes from. Each of `distances.DISTANCES` is then computed three times:

    live_vs_cache   from the live engine to the cache: the error that a student would train on
    live_vs_live    from the live engine to itself: its numerical noise
    codec           from the live engine to decode(encode(it)): the loss of the codec, measured on the same rows

The cache is usable when, for each distance, live_vs_cache is at most `MARGIN` times the sum of the other two, plus
`Tolerance.floor`. A cache of wrong ids has hardly an entry in common with its teacher, one of another teacher has other
label probabilities, one of other layers has other hidden states: no single distance detects all of these.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from actors.checks.distances import DISTANCES, distances
from pipeline.cache.faithfulness import Distance, Verdict
from pipeline.cache.format.codecs import decode_signals, encode_signals
from pipeline.cache.format.schema import ShardSpec
from pipeline.contracts import Engine, ScoredSequence, Signals

MARGIN = 3.0
"""Covers the variance of a mean over some thousand noisy positions; a wrong model or token differs by far more."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The name of a distance in messages, and what is allowed without noise or codec loss."""

    title: str
    floor: float
    """For rounding, and for shares of few positions."""


TOLERANCES = {
    "kl_nats": Tolerance("live against cache", 1e-4),
    "label_nats": Tolerance("log-probability of the label", 1e-3),
    "entropy_nats": Tolerance("entropy", 1e-3),
    "top_share": Tolerance("positions of another top entry", 0.05),
    "entry_share": Tolerance("kept ids that the cache lacks", 0.02),
    "hidden_share": Tolerance("error of hidden states", 0.01),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Sums over positions; divide by `positions` for means."""

    positions: int = 0
    sums_3M: NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, len(DISTANCES))))
    """[3, M]: rows live_vs_cache, live_vs_live, codec; columns as DISTANCES."""

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(self.positions + other.positions, self.sums_3M + other.sums_3M)


def compare_unit(engine: Engine, cached: Sequence[ScoredSequence], spec: ShardSpec) -> Comparison:
    """Score the rows of a unit twice and compare them with the cache. Raises EngineDead."""
    sequences = [row.sequence for row in cached]
    live = engine.score(sequences)
    again = [engine.score([sequence])[0] for sequence in reversed(sequences)][::-1]
    parts = zip(live, again, cached, strict=True)
    return sum((_compare(once, twice, row, spec) for once, twice, row in parts), Comparison())


def assess(comparisons: Iterable[Comparison], units: Sequence[str]) -> Verdict:
    """Decide by the means over the sample whether the cache may be used for training."""
    total = sum(comparisons, Comparison())
    means_3M = (total.sums_3M / max(total.positions, 1)).tolist()
    found = {
        name: Distance(cache, live, codec, MARGIN * (live + codec) + TOLERANCES[name].floor)
        for name, cache, live, codec in zip(DISTANCES, *means_3M, strict=True)
    }
    usable = bool(total.positions) and all(distance.within for distance in found.values())
    return Verdict(usable, total.positions, tuple(units), found, _why(found))


def _compare(live: Signals, again: Signals, cached: ScoredSequence, spec: ShardSpec) -> Comparison:
    stored = decode_signals(encode_signals(live, spec), len(cached.sequence.input_ids_N), spec)
    others = (cached.signals, again, stored)
    sums_3M = np.stack([distances(live, other, spec.capture.mode) for other in others])
    return Comparison(len(live.label_logprob_T), sums_3M)


def _why(found: dict[str, Distance]) -> str:
    """The distances that are too large, with all figures; if none is, the KL divergence, and the others in short."""
    beyond = {name: distance for name, distance in found.items() if not distance.within}
    in_full = "; ".join(
        _in_full(name, distance) for name, distance in (beyond or {"kl_nats": found["kl_nats"]}).items()
    )
    if beyond:
        return in_full
    in_short = (
        f"{TOLERANCES[name].title} {distance.live_vs_cache:.1e} of {distance.allowed:.1e}"
        for name, distance in found.items()
        if name != "kl_nats"
    )
    return f"{_in_full('kl_nats', found['kl_nats'])}; {', '.join(in_short)}"


def _in_full(name: str, distance: Distance) -> str:
    unit = " nats" if name.endswith("_nats") else ""
    relation = "within" if distance.within else "further from the teacher than"
    return (
        f"{TOLERANCES[name].title} {distance.live_vs_cache:.2e}{unit}, {relation} {distance.allowed:.2e} "
        f"(engine's noise {distance.live_vs_live:.2e}, codec {distance.codec:.2e})"
    )
