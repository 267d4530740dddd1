"""What every signal means, in numpy and float64: the definition that the device path is held against.

The dummy engine scores with it as well. Nothing here is fast for a large vocabulary: every row is sorted whole.
Formulas: the module docstring of `pipeline.contracts`, and `actors/signals/reduce.py` for the device path.
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
    """Entries of every row, best first; a weight of 0 is padding."""

    id_TK: Int
    weight_TK: F64
    in_TV: Bool
    """Whether the row keeps that token; the others are its tail."""


def reference_signals(
    logits_TV: NDArray[np.floating],
    label_T: NDArray[np.integer],
    spec: CaptureSpec,
    sequence_id: str,
    boundary_V: Bool | None = None,
) -> Signals:
    """Signals of one sequence from its whole logits, hidden states left out.

    `boundary_V` marks the tokens that start a word, and is needed where the spec asks for `boundary`.
    """
    logits = np.asarray(logits_TV, dtype=np.float64)
    logprob = logits - _logsumexp(logits)[:, None]
    kept = _keep(logprob, spec, sequence_id)
    weight = kept.weight_TK
    with np.errstate(divide="ignore"):
        logweight = np.log(weight)
    tail_TV = np.where(kept.in_TV, -np.inf, logprob)
    return Signals(
        entry_id_TK=np.where(weight > 0, kept.id_TK, 0).astype(np.int32),
        entry_logweight_TK=_f32(logweight),
        tail_logmass_T=_f32(_tail_logmass(tail_TV, weight, spec)),
        label_logprob_T=_f32(np.take_along_axis(logprob, np.asarray(label_T, dtype=np.int64)[:, None], axis=1)[:, 0]),
        entropy_T=_f32(-_dot(np.exp(logprob), logprob)),
        log_partition_TC=_f32(np.stack([_logsumexp(logprob / t) for t in spec.temperatures], axis=1))
        if spec.temperatures
        else np.zeros((len(logits), 0), np.float32),
        tail_shape_T3=_f32(_tail_shape(tail_TV)) if spec.any_temperature else None,
        boundary_logmass_T=None if boundary_V is None else _f32(_logsumexp(np.where(boundary_V, logprob, -np.inf))),
    )


def _keep(logprob_TV: F64, spec: CaptureSpec, sequence_id: str) -> _Kept:
    if spec.mode is TargetMode.UNBIASED:
        return _threshold_sample(logprob_TV, spec, sequence_id)
    if spec.mode is TargetMode.SAMPLED:
        return _draw(logprob_TV, spec, sequence_id)
    order = np.argsort(-logprob_TV, axis=1, kind="stable")[:, : spec.k]
    weight = np.exp(np.take_along_axis(logprob_TV, order, axis=1))
    if spec.mode is TargetMode.TOPP:
        before = np.cumsum(weight, axis=1) - weight
        rank = np.arange(order.shape[1])
        weight = np.where((before < spec.top_p) | (rank < spec.min_k), weight, 0.0)
    return _Kept(order, weight, _marked(order, weight > 0, logprob_TV.shape))


def _threshold_sample(logprob_TV: F64, spec: CaptureSpec, sequence_id: str) -> _Kept:
    """Head-exact threshold sampling: `k` distinct entries whose expectation is the distribution itself."""
    rows = [
        _threshold_sample_row(np.exp(logprob), spec.k, float(u))
        for logprob, (u,) in zip(logprob_TV, row_uniforms(spec, sequence_id, len(logprob_TV)), strict=True)
    ]
    ids, weights = np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])
    return _Kept(ids, weights, _marked(ids, weights > 0, logprob_TV.shape))


def _threshold_sample_row(prob_V: F64, k: int, u: float) -> tuple[Int, F64]:
    order = np.argsort(-prob_V, kind="stable")
    rest = np.cumsum(prob_V[order][::-1])[::-1]  # rest[m]: what the m best leave
    best = next(m for m in range(k) if prob_V[order[m]] * (k - m) <= rest[m])
    threshold = rest[best] / (k - best)
    sure_V = (prob_V >= threshold * (1 - 1e-12)) & (prob_V > 0)
    sure = order[: np.count_nonzero(sure_V)]
    others = np.where(sure_V, 0.0, prob_V)
    wanted = k - len(sure) if others.any() else 0  # no others: at most k tokens are possible, and all are kept
    edges = np.cumsum(others)
    drawn = np.searchsorted(edges / (edges[-1] or 1.0) * wanted, u + np.arange(wanted), side="left")
    ids, weights = np.zeros(k, np.int64), np.zeros(k)
    ids[: len(sure) + wanted] = np.concatenate([sure, drawn])
    weights[: len(sure) + wanted] = np.concatenate([prob_V[sure], np.full(wanted, threshold)])
    return ids, weights


def _draw(logprob_TV: F64, spec: CaptureSpec, sequence_id: str) -> _Kept:
    """Draws with replacement, counted: RS-KD."""
    cumulated = np.cumsum(np.exp(logprob_TV), axis=1)
    cumulated /= cumulated[:, -1:]
    uniforms = row_uniforms(spec, sequence_id, len(logprob_TV))
    ids, weights = np.zeros((len(logprob_TV), spec.k), np.int64), np.zeros((len(logprob_TV), spec.k))
    for row, (edges, u) in enumerate(zip(cumulated, uniforms, strict=True)):
        drawn, count = np.unique(np.searchsorted(edges, u, side="left"), return_counts=True)
        best = np.argsort(-count, kind="stable")[: spec.k]
        ids[row, : len(best)], weights[row, : len(best)] = drawn[best], count[best] / spec.draws
    return _Kept(ids, weights, _marked(ids, weights > 0, logprob_TV.shape))


def _tail_logmass(tail_TV: F64, weight_TK: F64, spec: CaptureSpec) -> F64:
    """Log of what the entries leave out: a sum over the tail, never one minus a sum."""
    if spec.mode in (TargetMode.TOPK, TargetMode.TOPP):
        return _logsumexp(tail_TV)
    if spec.mode is TargetMode.UNBIASED:
        return np.full(len(tail_TV), -np.inf)
    missed = spec.draws - np.rint(weight_TK.sum(axis=1) * spec.draws)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(missed / spec.draws))


def _tail_shape(tail_TV: F64) -> F64:
    """S(1/2), S'(1/2) and S'(1) of S(b) = log sum_tail exp(b log p); -inf, 0, 0 for an empty tail."""
    half = _logsumexp(tail_TV / 2)
    slopes = [_mean_logprob(tail_TV, beta) for beta in (0.5, 1.0)]
    return np.stack([half, *slopes], axis=1)


def _mean_logprob(tail_TV: F64, beta: float) -> F64:
    total = _logsumexp(beta * tail_TV)
    share = np.exp(beta * tail_TV - np.where(np.isfinite(total), total, 0.0)[:, None])
    return _dot(share, tail_TV)


def _dot(share_TV: F64, logprob_TV: F64) -> F64:
    """Row sums of share times log-probability, where no share times -inf is 0."""
    total: F64 = np.einsum("tv,tv->t", share_TV, np.where(share_TV > 0, logprob_TV, 0.0))
    return total


def _marked(id_TK: Int, real_TK: Bool, shape: tuple[int, ...]) -> Bool:
    marked = np.zeros(shape, dtype=bool)
    rows = np.broadcast_to(np.arange(len(id_TK))[:, None], id_TK.shape)
    marked[rows[real_TK], id_TK[real_TK]] = True
    return marked


def _logsumexp(values_TV: F64) -> F64:
    peak = values_TV.max(axis=1, initial=-np.inf)
    safe = np.where(np.isfinite(peak), peak, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(safe + np.log(np.exp(values_TV - safe[:, None]).sum(axis=1)))


def _f32(values: F64) -> FloatArray:
    return values.astype(np.float32)
