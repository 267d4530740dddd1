"""Whether a cache is as close to its teacher as the teacher is to itself.

A few committed units are scored again on the live engine, twice, the second time row by row in reverse order, since
batching is where an engine's own noise comes from. Three divergences are then set side by side, in nats a position:

    live_vs_cache   KL(live || cache): what a student that trains on the cache is told wrongly
    live_vs_live    KL(live || live again): the engine's own noise
    codec           KL(live || decode(encode(live))): what the codec's rounding takes, measured on the same rows

The cache is usable when live_vs_cache is at most `MARGIN` times the sum of the other two. A divergence is taken over
the entries that both sides know the probability of, and one bucket for the rest: a lower bound of the exact KL, the
same for all three.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codecs import decode_signals, encode_signals
from pipeline.cache.layout import FAITHFULNESS_JSON as FAITHFULNESS_JSON  # where the verdict lies in the cache
from pipeline.cache.schema import ShardSpec
from pipeline.contracts import Engine, ScoredSequence, Signals, TargetMode

MARGIN = 3.0
"""A mean over some thousand noisy positions wanders; a wrong model or a wrong token is off by far more."""
FLOOR_NATS = 1e-4
"""An engine without noise and a codec without loss still round somewhere."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Sums over positions; divide by `positions` for means."""

    positions: int = 0
    live_vs_cache_nats: float = 0.0
    live_vs_live_nats: float = 0.0
    codec_nats: float = 0.0

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(
            self.positions + other.positions,
            self.live_vs_cache_nats + other.live_vs_cache_nats,
            self.live_vs_live_nats + other.live_vs_live_nats,
            self.codec_nats + other.codec_nats,
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `faithfulness.json` holds. Means in nats a position."""

    usable: bool
    positions: int
    units: tuple[str, ...]
    live_vs_cache_nats: float
    live_vs_live_nats: float
    codec_nats: float
    allowed_nats: float
    why: str

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"units": list(self.units)}


def judge(comparisons: Iterable[Comparison], units: Sequence[str]) -> Verdict:
    """Whether the cache may be trained from, by the sample's means."""
    total = sum(comparisons, Comparison())
    positions = max(total.positions, 1)
    cache = total.live_vs_cache_nats / positions
    live, codec = total.live_vs_live_nats / positions, total.codec_nats / positions
    allowed = MARGIN * (live + codec) + FLOOR_NATS
    usable = bool(total.positions) and math.isfinite(cache) and cache <= allowed
    relation = "within" if usable else "further from the teacher than"
    why = (
        f"live against cache {cache:.2e} nats, {relation} {allowed:.2e} (engine's noise {live:.2e}, codec {codec:.2e})"
    )
    return Verdict(usable, total.positions, tuple(units), cache, live, codec, allowed, why)


def compare_unit(engine: Engine, cached: Sequence[ScoredSequence], spec: ShardSpec) -> Comparison:
    """Score a unit's rows twice and hold them against what the cache holds. Raises EngineDead."""
    sequences = [row.sequence for row in cached]
    live = engine.score(sequences)
    again = [engine.score([sequence])[0] for sequence in reversed(sequences)][::-1]
    parts = zip(live, again, cached, strict=True)
    return sum((_compare(once, twice, row, spec) for once, twice, row in parts), Comparison())


def bucket_kl(p: Signals, q: Signals, mode: TargetMode) -> NDArray[np.float64]:
    """KL(p || q) by position [T], in nats, over the entries known to both and one bucket for all others."""
    if mode is TargetMode.SAMPLED:
        return _label_kl(p, q)
    p_TK, q_TK, shared_TK = _aligned(p, q, mode)
    parts_TK = np.where(shared_TK, p_TK * (np.log(p_TK) - np.log(q_TK)), 0.0)
    rest_p_T = np.maximum(1.0 - np.where(shared_TK, p_TK, 0.0).sum(1), 0.0)
    rest_q_T = np.maximum(1.0 - np.where(shared_TK, q_TK, 0.0).sum(1), 0.0)
    kl_T: NDArray[np.float64] = np.maximum(parts_TK.sum(1) + _bucket(rest_p_T, rest_q_T), 0.0)
    return kl_T


def _compare(live: Signals, again: Signals, cached: ScoredSequence, spec: ShardSpec) -> Comparison:
    mode = spec.capture.mode
    stored = decode_signals(encode_signals(live, spec), len(cached.sequence.input_ids_N), spec)
    return Comparison(
        positions=len(live.label_logprob_T),
        live_vs_cache_nats=float(bucket_kl(live, cached.signals, mode).sum()),
        live_vs_live_nats=float(bucket_kl(live, again, mode).sum()),
        codec_nats=float(bucket_kl(live, stored, mode).sum()),
    )


def _aligned(p: Signals, q: Signals, mode: TargetMode) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_]]:
    """Probabilities [T, K] of p's entries under p and q, and where both know them (1 elsewhere, so logs are quiet)."""
    p_known_TK, q_known_TK = _known(p, mode), _known(q, mode)
    q_TK = np.ones(p.entry_id_TK.shape)
    shared_TK = np.zeros(p.entry_id_TK.shape, dtype=bool)
    for t in range(len(p.entry_id_TK)):
        known = np.flatnonzero(q_known_TK[t])
        ids, at = q.entry_id_TK[t, known], np.argsort(q.entry_id_TK[t, known], kind="stable")
        if not len(ids):
            continue
        found = np.minimum(np.searchsorted(ids[at], p.entry_id_TK[t]), len(ids) - 1)
        shared_TK[t] = p_known_TK[t] & (ids[at][found] == p.entry_id_TK[t])
        q_TK[t] = np.where(shared_TK[t], np.exp(q.entry_logweight_TK[t, known][at][found], dtype=np.float64), 1.0)
    p_TK = np.where(shared_TK, np.exp(p.entry_logweight_TK, dtype=np.float64), 1.0)
    return p_TK, q_TK, shared_TK


def _known(signals: Signals, mode: TargetMode) -> NDArray[np.bool_]:
    """Entries whose weight is the teacher's probability: all, but the head alone where the tail is a threshold."""
    weight_TK = signals.entry_logweight_TK
    kept_TK: NDArray[np.bool_] = np.isfinite(weight_TK)
    if mode is not TargetMode.UNBIASED:
        return kept_TK
    lowest_T1 = np.where(kept_TK, weight_TK, np.inf).min(axis=1, keepdims=True)
    head_TK: NDArray[np.bool_] = kept_TK & (weight_TK > lowest_T1 + 1e-3)
    return head_TK


def _label_kl(p: Signals, q: Signals) -> NDArray[np.float64]:
    """Draws say little about one position; the label's probability is exact in every mode."""
    p_T = np.exp(p.label_logprob_T, dtype=np.float64)
    q_T = np.exp(q.label_logprob_T, dtype=np.float64)
    kl_T: NDArray[np.float64] = np.maximum(_bucket(p_T, q_T) + _bucket(1.0 - p_T, 1.0 - q_T), 0.0)
    return kl_T


def _bucket(p_T: NDArray[np.float64], q_T: NDArray[np.float64]) -> NDArray[np.float64]:
    """p log(p/q), with the share of q kept from 0 by what a float16 scalar can still tell apart."""
    smallest = 1e-6
    p_T, q_T = np.clip(p_T, smallest, 1.0), np.clip(q_T, smallest, 1.0)
    part_T: NDArray[np.float64] = p_T * (np.log(p_T) - np.log(q_T))
    return part_T
