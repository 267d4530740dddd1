"""The teacher's log-partition at other temperatures, from the three scalars a row of `any_temperature` (topk and topp).

With b = 1/temperature, the tail's log-sum S(b) = log sum_{v not kept} exp(b log p_v) is smooth and convex in b. S(0) is
the log of the tail's size, which is known; S(1) is the tail log-mass, which is stored in any case; S(1/2), S'(1/2) and
S'(1) are the three scalars. S is interpolated at temperatures 1 to 2.5 by the quartic through these five values. It is
exact at 1 and 2, and in between its error is a few hundredths of a nat on the tails of language models (measured by
`make bench-cache`).
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import FloatArray, Signals

MIN_TEMPERATURE, MAX_TEMPERATURE = 1.0, 2.5


def tail_log_sum(
    tail_size_T: NDArray[np.integer], tail_logmass_T: FloatArray, tail_shape_T3: FloatArray, temperature: float
) -> FloatArray:
    """Return S(1/temperature) of each row, [T]; -inf for an empty tail.

    `tail_size_T` is the number of tokens that are not kept; `tail_shape_T3` holds S(1/2), S'(1/2), S'(1).
    Raises ValueError for a temperature outside [1, 2.5].
    """
    if not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise ValueError(f"temperature: expected {MIN_TEMPERATURE} to {MAX_TEMPERATURE}, got {temperature}")
    empty_T = (tail_size_T < 1) | np.isneginf(tail_logmass_T)
    shape_T3 = np.where(empty_T[:, None], 0.0, tail_shape_T3)
    at_zero_T = np.log(np.where(empty_T, 1, tail_size_T))
    change_T = _hermite_quartic(
        shape_T3[:, 0] - at_zero_T,
        np.where(empty_T, 0.0, tail_logmass_T) - at_zero_T,
        shape_T3[:, 1],
        shape_T3[:, 2],
        1.0 / temperature,
    )
    return np.where(empty_T, -np.inf, at_zero_T + change_T).astype(np.float32)


def head_log_sum(entry_logweight_TK: FloatArray, temperature: float) -> FloatArray:
    """Return log sum exp(log-weight / temperature) over each row's entries, [T]; the largest entry is first."""
    scaled_TK = entry_logweight_TK / np.float32(temperature)
    largest_T = scaled_TK[:, 0]
    log_sum_T: FloatArray = largest_T + np.log(np.exp(scaled_TK - largest_T[:, None]).sum(axis=1))
    return log_sum_T


def partition_at(signals: Signals, vocabulary: int, temperature: float) -> tuple[FloatArray, FloatArray]:
    """Return the tail's log-sum and the log-partition over the vocabulary at a temperature, [T] each.

    At that temperature an entry's log-probability is `log-weight / temperature - log-partition`, and the tail log-mass
    is the first result minus the second. Raises ValueError outside [1, 2.5] or if the scalars were not captured.
    """
    if signals.tail_shape_T3 is None:
        raise ValueError("tail_shape_T3: expected the scalars of any_temperature, got none")
    size_T = vocabulary - np.isfinite(signals.entry_logweight_TK).sum(axis=1)
    tail_T = tail_log_sum(size_T, signals.tail_logmass_T, signals.tail_shape_T3, temperature)
    return tail_T, np.logaddexp(head_log_sum(signals.entry_logweight_TK, temperature), tail_T)


def _hermite_quartic(
    half_T: NDArray[np.floating],
    one_T: NDArray[np.floating],
    slope_half_T: NDArray[np.floating],
    slope_one_T: NDArray[np.floating],
    b: float,
) -> NDArray[np.floating]:
    """Evaluate at b the quartic with value 0 at 0 and these values and slopes at 1/2 and 1 (Hermite interpolation)."""
    first = 6 * one_T - 4 * slope_half_T - slope_one_T
    second = 16 * half_T - 29 * one_T + 16 * slope_half_T + 5 * slope_one_T
    third = -32 * half_T + 44 * one_T - 20 * slope_half_T - 8 * slope_one_T
    fourth = 16 * half_T - 20 * one_T + 8 * slope_half_T + 4 * slope_one_T
    value_T: NDArray[np.floating] = b * (first + b * (second + b * (third + b * fourth)))
    return value_T
