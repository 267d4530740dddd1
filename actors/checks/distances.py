"""Distances between two `Signals` of the same positions: from the live teacher, and from the cache or another run.

Six distances, each a sum over positions, each 0 where the signals are equal:

    kl_nats        a lower bound of KL(p || q), see `bounded_kl`
    label_nats     |difference| of the label's log-probability
    entropy_nats   |difference| of the entropies
    top_share      the most probable entry of p is not among the most probable of q
    entry_share    share of p's kept ids that q does not keep
    hidden_share   |p - q| / |p| of the hidden states (Euclidean), mean over layers; the exact states count as a layer
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.bfloat16 import to_float32
from pipeline.contracts import Signals, TargetMode

DISTANCES = ("kl_nats", "label_nats", "entropy_nats", "top_share", "entry_share", "hidden_share")

F64_T = NDArray[np.float64]
F64_TK = NDArray[np.float64]
Bool_TK = NDArray[np.bool_]


def distances(p: Signals, q: Signals, mode: TargetMode) -> NDArray[np.float64]:
    """The sums over positions of `DISTANCES`, in that order. NaN where the signals contain NaN."""
    q_TK = _weights_in(q, p)
    kept_TK = np.isfinite(p.entry_logweight_TK)
    best_q_T = q.entry_logweight_TK.max(axis=1, initial=-np.inf)
    absent_TK = kept_TK & np.isneginf(q_TK)
    by_position = (
        bounded_kl(p, q, mode),
        _absolute_difference(p.label_logprob_T, q.label_logprob_T),
        _absolute_difference(p.entropy_T, q.entropy_T),
        kept_TK[:, 0] & (q_TK[:, 0] < best_q_T),
        absent_TK.sum(axis=1) / np.maximum(kept_TK.sum(axis=1), 1),
        _hidden_errors(p, q),
    )
    return np.array([np.sum(values_T, dtype=np.float64) for values_T in by_position])


def bounded_kl(p: Signals, q: Signals, mode: TargetMode) -> F64_T:
    """Lower bound of KL(p || q) per position [T], in nats, from the kept entries of both distributions.

    KL on a partition of the vocabulary never exceeds KL (data processing inequality). Partition 1: every id whose
    probability is known in both is a cell, all others are one cell. Partition 2: an id that p knows and q does not keep
    is a cell too, with the weight of q's least entry, an upper bound that cannot raise the KL. Returns the larger
    value. `sampled`: the cells are the label and all others, as the label's probability is exact in every mode.
    """
    if mode is TargetMode.SAMPLED:
        label_p_T, label_q_T = (np.exp(s.label_logprob_T, dtype=np.float64) for s in (p, q))
        label_T: F64_T = np.maximum(_cell(label_p_T, label_q_T) + _cell(1.0 - label_p_T, 1.0 - label_q_T), 0.0)
        return label_T
    with np.errstate(over="ignore"):
        p_TK, q_TK = np.exp(p.entry_logweight_TK, dtype=np.float64), np.exp(_weights_in(q, p))
    most_T1 = _max_absent_weight(q, mode)
    known_TK, shared_TK = _known(p, mode), _known(p, mode) & (q_TK > 0)
    if mode is TargetMode.UNBIASED:
        shared_TK &= q_TK > most_T1 * np.exp(_SAME_WEIGHT)
    absent_TK = known_TK & ~shared_TK
    rest_q_T = 1.0 - np.where(shared_TK, q_TK, 0.0).sum(axis=1)
    shared_T = np.where(shared_TK, _cell(p_TK, q_TK), 0.0).sum(axis=1)
    absent_T = np.where(absent_TK, _cell(p_TK, np.broadcast_to(most_T1, p_TK.shape)), 0.0).sum(axis=1)
    coarse_T = shared_T + _cell(1.0 - np.where(shared_TK, p_TK, 0.0).sum(axis=1), rest_q_T)
    fine_T = shared_T + absent_T + _cell(1.0 - np.where(known_TK, p_TK, 0.0).sum(axis=1), rest_q_T)
    kl_T: F64_T = np.maximum(np.maximum(coarse_T, fine_T), 0.0)
    return kl_T


_SAME_WEIGHT = 1e-3
"""Entries of an `unbiased` row whose log-weight is at most this above the least one belong to the sampled tail."""


def _known(signals: Signals, mode: TargetMode) -> Bool_TK:
    """Entries whose weight is the teacher's probability: all; in `unbiased` rows only the exact head."""
    kept_TK: Bool_TK = np.isfinite(signals.entry_logweight_TK)
    if mode is TargetMode.UNBIASED:
        kept_TK &= signals.entry_logweight_TK > _least(signals) + _SAME_WEIGHT
    return kept_TK


def _max_absent_weight(signals: Signals, mode: TargetMode) -> F64_TK:
    """Upper bound [T, 1] of the probability of an id that is not kept: the least entry, and the mass of the tail."""
    least_T1: F64_TK = np.exp(_least(signals), dtype=np.float64)
    if mode is TargetMode.UNBIASED:
        return least_T1
    most_T1: F64_TK = np.minimum(least_T1, np.exp(signals.tail_logmass_T, dtype=np.float64)[:, None])
    return most_T1


def _least(signals: Signals) -> NDArray[np.float32]:
    """The smallest log-weight of each row, [T, 1]."""
    weight_TK = signals.entry_logweight_TK
    least_T1: NDArray[np.float32] = np.where(np.isfinite(weight_TK), weight_TK, 0.0).min(axis=1, keepdims=True)
    return least_T1


def _weights_in(q: Signals, p: Signals) -> F64_TK:
    """Log-weights [T, K] that q gives to p's entries, -inf where it does not keep them."""
    weight_TK = np.full(p.entry_id_TK.shape, -np.inf)
    for t, ids in enumerate(p.entry_id_TK):
        kept = np.flatnonzero(np.isfinite(q.entry_logweight_TK[t]))
        _, of_p, of_q = np.intersect1d(ids, q.entry_id_TK[t, kept], return_indices=True)
        weight_TK[t, of_p] = q.entry_logweight_TK[t, kept[of_q]]
    weight_TK[~np.isfinite(p.entry_logweight_TK)] = -np.inf
    return weight_TK


def _cell(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """p log(p/q), with probabilities clipped to what a float16 scalar can represent."""
    smallest = 1e-6
    p, q = np.clip(p, smallest, 1.0), np.clip(q, smallest, 1.0)
    part: NDArray[np.float64] = p * (np.log(p) - np.log(q))
    return part


def _absolute_difference(p_T: NDArray[np.float32], q_T: NDArray[np.float32]) -> F64_T:
    """|p - q|, 0 where both are the same infinity."""
    with np.errstate(invalid="ignore"):
        return np.where(p_T == q_T, 0.0, np.abs(p_T.astype(np.float64) - q_T))


def _hidden_errors(p: Signals, q: Signals) -> F64_T:
    """The mean over layers of |p - q| / |p|, [T]; 0 without states."""
    p_TLD, q_TLD = _states(p), _states(q)
    if p_TLD.shape != q_TLD.shape:
        return np.full(len(p_TLD), np.inf)
    norm_TL = np.linalg.norm(p_TLD, axis=2)
    error_TL = np.linalg.norm(p_TLD - q_TLD, axis=2) / np.where(norm_TL > 0, norm_TL, 1.0)
    error_T: F64_T = error_TL.sum(axis=1) / max(error_TL.shape[1], 1)
    return error_T


def _states(signals: Signals) -> NDArray[np.float64]:
    """All states of a position, [T, L, D]: the kept layers and, where it is there, the exact one."""
    exact_TD = signals.exact_hidden_TD
    parts = [part for part in (signals.hidden_TLD, None if exact_TD is None else exact_TD[:, None]) if part is not None]
    if not parts:
        return np.zeros((len(signals.label_logprob_T), 0, 0))
    return to_float32(np.concatenate(parts, axis=1)).astype(np.float64)
