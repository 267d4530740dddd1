"""Ways to keep a distribution, and the gradients that each of them teaches: the arithmetic behind `verify --audit`.

Shapes: T positions, V vocabulary, K entries, D hidden width. Everything is float32 but sums that must not drift.
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
"""The targets whose weights are the teacher's probabilities, which is what a KL to them says something about."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a student would learn from at each position: some ids with weights, and one bucket for all others."""

    name: str
    entry_id_TK: Ids
    weight_TK: FloatArray
    """0 in padding."""
    tail_T: FloatArray
    """Mass of the bucket; 0 where the weights sum to 1."""


class Head:
    """An LM head in float32: logits of states, and gradients back."""

    def __init__(self, head: LmHead) -> None:
        self.weight_VD = to_float32(head.weight_VD)
        self._bias_V = head.bias_V
        self._scale = np.float32(head.scale)
        self._soft_cap = None if head.soft_cap is None else np.float32(head.soft_cap)

    def logits(self, state_TD: FloatArray) -> FloatArray:
        """`scale * (state @ weight.T + bias)`, soft-capped where the model does so, [T, V]."""
        raw_TV = state_TD @ self.weight_VD.T
        if self._bias_V is not None:
            raw_TV += self._bias_V
        raw_TV *= self._scale
        return raw_TV if self._soft_cap is None else self._soft_cap * np.tanh(raw_TV / self._soft_cap)

    def slope(self, logits_TV: FloatArray) -> FloatArray | None:
        """How much each logit follows the state times the weight, [T, V]; None where that is 1 everywhere."""
        if self._soft_cap is not None:
            return self._scale * (1 - (logits_TV / self._soft_cap) ** 2)
        return None if self._scale == 1.0 else np.full_like(logits_TV, self._scale)


def log_softmax(logits_TV: FloatArray) -> FloatArray:
    """Log-probabilities, [T, V]."""
    shifted_TV = logits_TV - logits_TV.max(axis=1, keepdims=True)
    log_TV: FloatArray = shifted_TV - np.log(np.exp(shifted_TV).sum(axis=1, keepdims=True))
    return log_TV


def what_if(p_TV: FloatArray, capture: CaptureSpec, generator: np.random.Generator) -> Iterator[Target]:
    """The targets that every mode would have kept of the exact distribution, with `k` entries (or draws) at most."""
    k = capture.k
    order_TK = np.argpartition(-p_TV, k - 1, axis=1)[:, :k]
    head_TK = np.take_along_axis(p_TV, order_TK, axis=1)
    order_TK = np.take_along_axis(order_TK, np.argsort(-head_TK, axis=1, kind="stable"), axis=1)
    head_TK = np.take_along_axis(p_TV, order_TK, axis=1)
    mass_T = head_TK.sum(axis=1, dtype=np.float64).astype(np.float32)
    none_T = np.zeros_like(mass_T)
    with_topk, with_topp = WITH_TAIL
    yield Target(with_topk, order_TK, head_TK, np.maximum(1 - mass_T, 0))
    prefix_TK = _prefix(head_TK, capture)
    yield Target(with_topp, order_TK, prefix_TK, np.maximum(1 - prefix_TK.sum(axis=1), 0))
    yield Target("topk renormalised", order_TK, head_TK / mass_T[:, None], none_T)
    rows = [_threshold_sample(p_V, order_K, generator.random()) for p_V, order_K in zip(p_TV, order_TK, strict=True)]
    yield Target("unbiased", *_stacked(rows, k), none_T)
    rows = [_draw(p_V, generator.random(k)) for p_V in p_TV]
    yield Target("sampled", *_stacked(rows, k), none_T)


def _prefix(head_TK: FloatArray, capture: CaptureSpec) -> FloatArray:
    """The shortest prefix of falling probabilities that reaches `top_p`, of `min_k` entries or more; 0 behind it."""
    before_TK = np.cumsum(head_TK, axis=1, dtype=np.float64) - head_TK
    kept_TK = (before_TK < capture.top_p) | (np.arange(capture.k) < capture.min_k)
    return np.where(kept_TK, head_TK, np.float32(0.0))


def state_gradient(
    target: Target, q_TV: FloatArray, q_state_TD: FloatArray, head: Head, slope: FloatArray | None
) -> FloatArray:
    """Gradient of the target's forward KL with respect to the student's state, [T, D].

    With kept mass Q = sum_K q: kept logits get `q_j - w_j`, the others move as one block, `q_j (1 - tail / (1 - Q))`.
    `q_state_TD` is `q @ weight` (with the slope), computed once for all targets.
    """
    rows_T1 = np.arange(len(q_TV))[:, None]
    q_TK = np.where(target.weight_TK > 0, q_TV[rows_T1, target.entry_id_TK], 0.0)
    rest_T = np.maximum(1 - q_TK.sum(axis=1), 1e-6)
    block_T1 = (1 - target.tail_T / rest_T)[:, None]
    kept_TK = (1 - block_T1) * q_TK - target.weight_TK
    if slope is not None:
        kept_TK *= slope[rows_T1, target.entry_id_TK]
    gradient_TD: FloatArray = block_T1 * q_state_TD
    for position, (ids_K, kept_K) in enumerate(zip(target.entry_id_TK, kept_TK, strict=True)):
        gradient_TD[position] += kept_K @ head.weight_VD[ids_K]
    return gradient_TD.astype(np.float32)


def bucket_kl(target: Target, p_TV: FloatArray) -> FloatArray:
    """KL of the exact distribution to the target over its entries and one bucket for the rest, [T].

    It is what quantising and the engine's own rounding cost. Meaningful for targets that keep probabilities.
    """
    p_TK = np.where(target.weight_TK > 0, np.take_along_axis(p_TV, target.entry_id_TK, axis=1), 0.0)
    kept_TK = np.where(p_TK > 0, p_TK * np.log(np.maximum(p_TK, 1e-38) / np.maximum(target.weight_TK, 1e-38)), 0.0)
    rest_T = np.maximum(1 - p_TK.sum(axis=1, dtype=np.float64), 0.0)
    tail_T = np.maximum(target.tail_T, 1e-9)
    tail_part_T = np.where(rest_T > 1e-9, rest_T * np.log(np.maximum(rest_T, 1e-9) / tail_T), 0.0)
    total_T: FloatArray = kept_TK.sum(axis=1) + tail_part_T
    return total_T


def _threshold_sample(p_V: FloatArray, order_K: Ids, u: float) -> tuple[Ids, FloatArray]:
    """Head-exact threshold sampling of one row: `order_K` are its K likeliest ids, falling; `u` is in [0, 1)."""
    k = len(order_K)
    falling_K = p_V[order_K].astype(np.float64)
    before_K = np.concatenate([[0.0], np.cumsum(falling_K)[:-1]])
    threshold_K = (1 - before_K) / (k - np.arange(k))
    heads = int(np.argmax(falling_K <= threshold_K)) if (falling_K <= threshold_K).any() else k - 1
    threshold = threshold_K[heads]
    share_V = p_V.astype(np.float64) / max(threshold, 1e-300)
    share_V[order_K[:heads]] = 0.0
    running_V = np.cumsum(share_V)
    running_V *= (k - heads) / running_V[-1]
    tail = np.searchsorted(running_V, u + np.arange(k - heads), side="left").clip(0, len(p_V) - 1)
    weights = np.concatenate([falling_K[:heads], np.full(k - heads, threshold)])
    return np.concatenate([order_K[:heads], tail]), weights.astype(np.float32)


def _draw(p_V: FloatArray, uniforms_K: NDArray[np.float64]) -> tuple[Ids, FloatArray]:
    """Draws with replacement from one row: distinct ids with their share of the draws."""
    running_V = np.cumsum(p_V, dtype=np.float64)
    drawn = np.searchsorted(running_V, uniforms_K * running_V[-1], side="right").clip(0, len(p_V) - 1)
    ids, counts = np.unique(drawn, return_counts=True)
    return ids, (counts / len(uniforms_K)).astype(np.float32)


def _stacked(rows: list[tuple[Ids, FloatArray]], k: int) -> tuple[Ids, FloatArray]:
    ids_TK, weight_TK = np.zeros((len(rows), k), np.int64), np.zeros((len(rows), k), np.float32)
    for position, (ids, weights) in enumerate(rows):
        ids_TK[position, : len(ids)], weight_TK[position, : len(weights)] = ids, weights
    return ids_TK, weight_TK
