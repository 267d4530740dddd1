"""Reference implementation of all signals in numpy and float64: the tests compare the device's reduction with it.

The dummy engine uses it too. It sorts every row, which is slow for a large vocabulary. Definitions of the signals:
`pipeline.contracts`; of the target modes and their sources: `actors.signals.entries`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.signals.sampling import row_uniforms
from pipeline.contracts import CaptureSpec, FloatArray, Signals, TargetMode

F64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Kept:
    """Entries of every row by falling weight; a weight of 0 is padding."""

    id_TK: Int
    weight_TK: F64
    in_TV: Bool
    """True for the kept tokens; the others are the tail."""


def reference_signals(
    logits_TV: NDArray[np.floating],
    label_T: NDArray[np.integer],
    spec: CaptureSpec,
    sequence_id: str,
    boundary_V: Bool | None = None,
) -> Signals:
    """Return the signals of one sequence from its logits, without hidden states.

    `boundary_V` marks the tokens that start a word; required if the spec has `boundary`.
    """
    logprob_TV: F64 = np.asarray(logits_TV, dtype=np.float64)
    logprob_TV = logprob_TV - _logsumexp(logprob_TV)[:, None]
    kept = _keep(logprob_TV, spec, sequence_id)
    weight_TK = kept.weight_TK
    with np.errstate(divide="ignore"):
        logweight_TK = np.log(weight_TK)
    tail_TV = np.where(kept.in_TV, -np.inf, logprob_TV)
    return Signals(
        entry_id_TK=np.where(weight_TK > 0, kept.id_TK, 0).astype(np.int32),
        entry_logweight_TK=_f32(logweight_TK),
        tail_logmass_T=_f32(_tail_logmass(tail_TV, weight_TK, spec)),
        label_logprob_T=_f32(logprob_TV[np.arange(len(logprob_TV)), label_T]),
        entropy_T=_f32(-_dot(np.exp(logprob_TV), logprob_TV)),
        log_partition_TC=_f32(np.stack([_logsumexp(logprob_TV / t) for t in spec.temperatures], axis=1))
        if spec.temperatures
        else np.zeros((len(logits_TV), 0), np.float32),
        tail_shape_T3=_f32(_tail_shape(tail_TV)) if spec.any_temperature else None,
        boundary_logmass_T=None if boundary_V is None else _f32(_logsumexp(np.where(boundary_V, logprob_TV, -np.inf))),
    )


def _keep(logprob_TV: F64, spec: CaptureSpec, sequence_id: str) -> _Kept:
    if spec.mode is TargetMode.UNBIASED:
        return _threshold_sample(logprob_TV, spec, sequence_id)
    if spec.mode is TargetMode.SAMPLED:
        return _sample_with_replacement(logprob_TV, spec, sequence_id)
    id_TK = np.argsort(-logprob_TV, axis=1, kind="stable")[:, : spec.k]
    weight_TK = np.exp(np.take_along_axis(logprob_TV, id_TK, axis=1))
    if spec.mode is TargetMode.TOPP:
        preceding_TK = np.cumsum(weight_TK, axis=1) - weight_TK
        rank_K = np.arange(id_TK.shape[1])
        weight_TK = np.where((preceding_TK < spec.top_p) | (rank_K < spec.min_k), weight_TK, 0.0)
    return _Kept(id_TK, weight_TK, _mask(id_TK, weight_TK > 0, logprob_TV.shape))


def _threshold_sample(logprob_TV: F64, spec: CaptureSpec, sequence_id: str) -> _Kept:
    """Threshold sampling with an exact head: k distinct entries whose expected weights are the probabilities."""
    rows = [
        _threshold_sample_row(np.exp(logprob), spec.k, float(u))
        for logprob, (u,) in zip(logprob_TV, row_uniforms(spec, sequence_id, len(logprob_TV)), strict=True)
    ]
    id_TK, weight_TK = np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])
    return _Kept(id_TK, weight_TK, _mask(id_TK, weight_TK > 0, logprob_TV.shape))


def _threshold_sample_row(prob_V: F64, k: int, u: float) -> tuple[Int, F64]:
    by_prob_V = np.argsort(-prob_V, kind="stable")
    mass_V = np.cumsum(prob_V[by_prob_V][::-1])[::-1]  # mass_V[m]: mass without the m largest
    m = next(m for m in range(k) if prob_V[by_prob_V[m]] * (k - m) <= mass_V[m])
    threshold = mass_V[m] / (k - m)
    exact_V = (prob_V >= threshold * (1 - 1e-12)) & (prob_V > 0)
    head = by_prob_V[: np.count_nonzero(exact_V)]
    others_V = np.where(exact_V, 0.0, prob_V)
    draws = k - len(head) if others_V.any() else 0  # no others: at most k tokens are possible, and all are kept
    cumulative_V = np.cumsum(others_V)
    drawn = np.searchsorted(cumulative_V / (cumulative_V[-1] or 1.0) * draws, u + np.arange(draws), side="left")
    id_K, weight_K = np.zeros(k, np.int64), np.zeros(k)
    id_K[: len(head) + draws] = np.concatenate([head, drawn])
    weight_K[: len(head) + draws] = np.concatenate([prob_V[head], np.full(draws, threshold)])
    return id_K, weight_K


def _sample_with_replacement(logprob_TV: F64, spec: CaptureSpec, sequence_id: str) -> _Kept:
    """RS-KD: an id's weight is its share of draws with replacement."""
    cumulative_TV = np.cumsum(np.exp(logprob_TV), axis=1)
    cumulative_TV /= cumulative_TV[:, -1:]
    uniform_TU = row_uniforms(spec, sequence_id, len(logprob_TV))
    id_TK, weight_TK = np.zeros((len(logprob_TV), spec.k), np.int64), np.zeros((len(logprob_TV), spec.k))
    for row, (cumulative_V, uniform_U) in enumerate(zip(cumulative_TV, uniform_TU, strict=True)):
        drawn, count = np.unique(np.searchsorted(cumulative_V, uniform_U, side="left"), return_counts=True)
        most = np.argsort(-count, kind="stable")[: spec.k]
        id_TK[row, : len(most)], weight_TK[row, : len(most)] = drawn[most], count[most] / spec.draws
    return _Kept(id_TK, weight_TK, _mask(id_TK, weight_TK > 0, logprob_TV.shape))


def _tail_logmass(tail_TV: F64, weight_TK: F64, spec: CaptureSpec) -> F64:
    """Return the log of the weight outside the entries, summed over the tail (1 - sum of the entries would cancel)."""
    if spec.mode in (TargetMode.TOPK, TargetMode.TOPP):
        return _logsumexp(tail_TV)
    if spec.mode is TargetMode.UNBIASED:
        return np.full(len(tail_TV), -np.inf)
    omitted = spec.draws - np.rint(weight_TK.sum(axis=1) * spec.draws)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(omitted / spec.draws))


def _tail_shape(tail_TV: F64) -> F64:
    """Return S(1/2), S'(1/2) and S'(1) of S(b) = log sum_tail exp(b log p); -inf, 0, 0 for an empty tail."""
    half_T = _logsumexp(tail_TV / 2)
    derivatives = [_mean_logprob(tail_TV, beta) for beta in (0.5, 1.0)]
    return np.stack([half_T, *derivatives], axis=1)


def _mean_logprob(tail_TV: F64, beta: float) -> F64:
    total_T = _logsumexp(beta * tail_TV)
    weight_TV = np.exp(beta * tail_TV - np.where(np.isfinite(total_T), total_T, 0.0)[:, None])
    return _dot(weight_TV, tail_TV)


def _dot(weight_TV: F64, logprob_TV: F64) -> F64:
    """Return the row sums of weight times log-probability, with 0 times -inf = 0."""
    total: F64 = np.einsum("tv,tv->t", weight_TV, np.where(weight_TV > 0, logprob_TV, 0.0))
    return total


def _mask(id_TK: Int, real_TK: Bool, shape: tuple[int, ...]) -> Bool:
    mask_TV = np.zeros(shape, dtype=bool)
    mask_TV[np.nonzero(real_TK)[0], id_TK[real_TK]] = True
    return mask_TV


def _logsumexp(values_TV: F64) -> F64:
    peak = values_TV.max(axis=1, initial=-np.inf)
    safe = np.where(np.isfinite(peak), peak, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(safe + np.log(np.exp(values_TV - safe[:, None]).sum(axis=1)))


def _f32(values: F64) -> FloatArray:
    return values.astype(np.float32)
