"""The teacher at another temperature, from three scalars a row that `any_temperature` keeps (`topk` and `topp` only).

With b = 1/temperature, the tail's log-sum S(b) = log sum_{v not kept} exp(b log p_v) is smooth and convex in b. Its
value at b = 0 is the log of the tail's size, which takes no bytes; S(1) is the tail's log-mass, which is kept anyway;
S(1/2), S'(1/2) and S'(1) are the three scalars. The quartic through all five stands for S at temperatures 1 to 2.5:
exact at 1 and 2, and between them within a few hundredths of a nat on the tails of language models
(`make bench-cache` measures it on a real one).
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import FloatArray, Signals

COLDEST, HOTTEST = 1.0, 2.5
"""The temperatures at which the tail can be rebuilt."""


def tail_log_sum(
    tail_size_T: NDArray[np.integer], tail_logmass_T: FloatArray, tail_shape_T3: FloatArray, temperature: float
) -> FloatArray:
    """S(1/temperature) of each row, [T]; -inf where the tail is empty.

    `tail_size_T` counts the tokens that are not kept; `tail_shape_T3` holds S(1/2), S'(1/2), S'(1).
    Raises ValueError for a temperature outside [1, 2.5].
    """
    if not COLDEST <= temperature <= HOTTEST:
        raise ValueError(f"temperature: expected {COLDEST} to {HOTTEST}, got {temperature}")
    empty_T = (tail_size_T < 1) | np.isneginf(tail_logmass_T)
    shape_T3 = np.where(empty_T[:, None], 0.0, tail_shape_T3)
    at_zero_T = np.log(np.where(empty_T, 1, tail_size_T))
    rise_T = _rise(
        shape_T3[:, 0] - at_zero_T,
        np.where(empty_T, 0.0, tail_logmass_T) - at_zero_T,
        shape_T3[:, 1],
        shape_T3[:, 2],
        1.0 / temperature,
    )
    return np.where(empty_T, -np.inf, at_zero_T + rise_T).astype(np.float32)


def head_log_sum(entry_logweight_TK: FloatArray, temperature: float) -> FloatArray:
    """log sum of `exp(log-weight / temperature)` over each row's entries, [T]. The first entry is a row's largest."""
    scaled_TK = entry_logweight_TK / np.float32(temperature)
    peak_T = scaled_TK[:, 0]
    total_T: FloatArray = peak_T + np.log(np.exp(scaled_TK - peak_T[:, None]).sum(axis=1))
    return total_T


def partition_at(signals: Signals, vocabulary: int, temperature: float) -> tuple[FloatArray, FloatArray]:
    """(tail's log-sum, log-partition over the whole vocabulary) at that temperature, [T] each.

    A kept entry's log-probability at that temperature is `log-weight / temperature - log-partition`, and the tail's
    log-mass is the difference of the two. Raises ValueError outside [1, 2.5] or where the scalars were not kept.
    """
    if signals.tail_shape_T3 is None:
        raise ValueError("tail_shape_T3: expected the scalars of any_temperature, got none")
    size_T = vocabulary - np.isfinite(signals.entry_logweight_TK).sum(axis=1)
    tail_T = tail_log_sum(size_T, signals.tail_logmass_T, signals.tail_shape_T3, temperature)
    return tail_T, np.logaddexp(head_log_sum(signals.entry_logweight_TK, temperature), tail_T)


def _rise(
    half_T: NDArray[np.floating],
    one_T: NDArray[np.floating],
    slope_half_T: NDArray[np.floating],
    slope_one_T: NDArray[np.floating],
    b: float,
) -> NDArray[np.floating]:
    """At b, the quartic that is 0 at 0 and has these values and slopes at 1/2 and 1 (Hermite interpolation)."""
    first = 6 * one_T - 4 * slope_half_T - slope_one_T
    second = 16 * half_T - 29 * one_T + 16 * slope_half_T + 5 * slope_one_T
    third = -32 * half_T + 44 * one_T - 20 * slope_half_T - 8 * slope_one_T
    fourth = 16 * half_T - 20 * one_T + 8 * slope_half_T + 4 * slope_one_T
    rise: NDArray[np.floating] = b * (first + b * (second + b * (third + b * fourth)))
    return rise
