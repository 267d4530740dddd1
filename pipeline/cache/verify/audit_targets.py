"""Targets that each mode would keep of a distribution, and their gradients: the arithmetic of `verify --audit`.

R positions are processed at a time. Arrays are float32, except sums that need float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.bfloat16 import to_float32
from pipeline.contracts import CaptureSpec, FloatArray, LmHead

Ids: TypeAlias = NDArray[np.integer]
WITH_TAIL = ("topk with tail", "topp with tail")
"""Names of the targets whose weights are the teacher's probabilities, so that a KL to them is meaningful."""


@dataclass(frozen=True, slots=True)
class Target:
    """A sparse target: kept ids with weights at each position, and one bucket for all other ids."""

    name: str
    entry_id_RK: Ids
    weight_RK: FloatArray
    """0 in padding."""
    tail_R: FloatArray
    """Mass of the bucket; 0 where the weights sum to 1."""


class Head:
    """An LM head in float32, with the derivative of its logits."""

    def __init__(self, head: LmHead) -> None:
        self.weight_VD = to_float32(head.weight_VD)
        self._bias_V = head.bias_V
        self._scale = np.float32(head.scale)
        self._soft_cap = None if head.soft_cap is None else np.float32(head.soft_cap)

    def logits(self, state_RD: FloatArray) -> FloatArray:
        """Compute `scale * (state @ weight.T + bias)`, then the soft cap if there is one, [R, V]."""
        logits_RV = state_RD @ self.weight_VD.T
        if self._bias_V is not None:
            logits_RV += self._bias_V
        logits_RV *= self._scale
        return logits_RV if self._soft_cap is None else self._soft_cap * np.tanh(logits_RV / self._soft_cap)

    def slope(self, logits_RV: FloatArray) -> FloatArray | None:
        """Compute the derivative of each logit by `state @ weight.T`, [R, V]; None where it is 1 everywhere."""
        if self._soft_cap is not None:
            return self._scale * (1 - (logits_RV / self._soft_cap) ** 2)
        return None if self._scale == 1.0 else np.full_like(logits_RV, self._scale)


def log_softmax(logits_RV: FloatArray) -> FloatArray:
    """Compute log-probabilities, [R, V]."""
    shifted_RV = logits_RV - logits_RV.max(axis=1, keepdims=True)
    logprob_RV: FloatArray = shifted_RV - np.log(np.exp(shifted_RV).sum(axis=1, keepdims=True))
    return logprob_RV


def simulated_targets(p_RV: FloatArray, capture: CaptureSpec, generator: np.random.Generator) -> Iterator[Target]:
    """Yield the targets that each mode keeps of the exact distribution, with at most `k` entries (or draws)."""
    k = capture.k
    top_RK = np.argpartition(-p_RV, k - 1, axis=1)[:, :k]
    p_RK = np.take_along_axis(p_RV, top_RK, axis=1)
    top_RK = np.take_along_axis(top_RK, np.argsort(-p_RK, axis=1, kind="stable"), axis=1)
    p_RK = np.take_along_axis(p_RV, top_RK, axis=1)
    mass_R = p_RK.sum(axis=1, dtype=np.float64).astype(np.float32)
    no_tail_R = np.zeros_like(mass_R)
    with_topk, with_topp = WITH_TAIL
    yield Target(with_topk, top_RK, p_RK, np.maximum(1 - mass_R, 0))
    prefix_RK = _top_p_prefix(p_RK, capture)
    yield Target(with_topp, top_RK, prefix_RK, np.maximum(1 - prefix_RK.sum(axis=1), 0))
    yield Target("topk renormalised", top_RK, p_RK / mass_R[:, None], no_tail_R)
    rows = [_threshold_sample(p_V, top_K, generator.random()) for p_V, top_K in zip(p_RV, top_RK, strict=True)]
    yield Target("unbiased", *_pad(rows, k), no_tail_R)
    rows = [_draw(p_V, generator.random(k)) for p_V in p_RV]
    yield Target("sampled", *_pad(rows, k), no_tail_R)


def _top_p_prefix(p_RK: FloatArray, capture: CaptureSpec) -> FloatArray:
    """Keep the shortest prefix of the sorted `p_RK` that reaches `top_p`, of at least `min_k` entries; 0 elsewhere."""
    before_RK = np.cumsum(p_RK, axis=1, dtype=np.float64) - p_RK
    kept_RK = (before_RK < capture.top_p) | (np.arange(capture.k) < capture.min_k)
    return np.where(kept_RK, p_RK, np.float32(0.0))


def state_gradient(
    target: Target, q_RV: FloatArray, q_state_RD: FloatArray, head: Head, slope: FloatArray | None
) -> FloatArray:
    """Compute the gradient of KL(target || student) by the student's state, [R, D].

    `q_RV` are the student's probabilities. With kept mass Q = sum_K q, the gradient by a kept logit is `q_j - w_j`, by
    any other `q_j (1 - tail / (1 - Q))`. `q_state_RD` is `(q * slope) @ weight`, computed once for all targets.
    """
    rows_R1 = np.arange(len(q_RV))[:, None]
    q_RK = np.where(target.weight_RK > 0, q_RV[rows_R1, target.entry_id_RK], 0.0)
    rest_R = np.maximum(1 - q_RK.sum(axis=1), 1e-6)
    rest_factor_R1 = (1 - target.tail_R / rest_R)[:, None]
    kept_RK = (1 - rest_factor_R1) * q_RK - target.weight_RK
    if slope is not None:
        kept_RK *= slope[rows_R1, target.entry_id_RK]
    gradient_RD: FloatArray = rest_factor_R1 * q_state_RD
    for row, (ids_K, kept_K) in enumerate(zip(target.entry_id_RK, kept_RK, strict=True)):
        gradient_RD[row] += kept_K @ head.weight_VD[ids_K]
    return gradient_RD.astype(np.float32)


def bucket_kl(target: Target, p_RV: FloatArray) -> FloatArray:
    """Compute KL(exact || target) over the target's entries and one bucket for all other ids, [R], nats.

    Meaningful for targets that keep probabilities: the cost of quantisation and of the engine's rounding.
    """
    p_RK = np.where(target.weight_RK > 0, np.take_along_axis(p_RV, target.entry_id_RK, axis=1), 0.0)
    kept_RK = np.where(p_RK > 0, p_RK * np.log(np.maximum(p_RK, 1e-38) / np.maximum(target.weight_RK, 1e-38)), 0.0)
    rest_R = np.maximum(1 - p_RK.sum(axis=1, dtype=np.float64), 0.0)
    tail_R = np.maximum(target.tail_R, 1e-9)
    rest_kl_R = np.where(rest_R > 1e-9, rest_R * np.log(np.maximum(rest_R, 1e-9) / tail_R), 0.0)
    kl_R: FloatArray = kept_RK.sum(axis=1) + rest_kl_R
    return kl_R


def _threshold_sample(p_V: FloatArray, top_K: Ids, u: float) -> tuple[Ids, FloatArray]:
    """Keep likely ids exactly, the rest by systematic sampling; `top_K`: the K likeliest ids, sorted; `u` in [0, 1)."""
    k = len(top_K)
    p_K = p_V[top_K].astype(np.float64)
    before_K = np.concatenate([[0.0], np.cumsum(p_K)[:-1]])
    threshold_K = (1 - before_K) / (k - np.arange(k))
    heads = int(np.argmax(p_K <= threshold_K)) if (p_K <= threshold_K).any() else k - 1
    threshold = threshold_K[heads]
    inclusion_V = p_V.astype(np.float64) / max(threshold, 1e-300)
    inclusion_V[top_K[:heads]] = 0.0
    cumulative_V = np.cumsum(inclusion_V)
    cumulative_V *= (k - heads) / cumulative_V[-1]
    tail = np.searchsorted(cumulative_V, u + np.arange(k - heads), side="left").clip(0, len(p_V) - 1)
    weights = np.concatenate([p_K[:heads], np.full(k - heads, threshold)])
    return np.concatenate([top_K[:heads], tail]), weights.astype(np.float32)


def _draw(p_V: FloatArray, uniform_U: NDArray[np.float64]) -> tuple[Ids, FloatArray]:
    """Draw from one row with replacement; return the distinct ids with their share of the draws."""
    cumulative_V = np.cumsum(p_V, dtype=np.float64)
    drawn_U = np.searchsorted(cumulative_V, uniform_U * cumulative_V[-1], side="right").clip(0, len(p_V) - 1)
    ids, counts = np.unique(drawn_U, return_counts=True)
    return ids, (counts / len(uniform_U)).astype(np.float32)


def _pad(rows: list[tuple[Ids, FloatArray]], k: int) -> tuple[Ids, FloatArray]:
    ids_RK, weight_RK = np.zeros((len(rows), k), np.int64), np.zeros((len(rows), k), np.float32)
    for row, (ids, weights) in enumerate(rows):
        ids_RK[row, : len(ids)], weight_RK[row, : len(weights)] = ids, weights
    return ids_RK, weight_RK
