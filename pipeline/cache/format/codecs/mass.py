"""Checks that the weights of a row's entries and its tail sum to 1.

The decoder rescales every row to 1 minus its tail mass, which hides wrong weights. So `check_mass` checks rows before
they are encoded, and `wrong_mass` checks stored codes before the rescaling.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.format.codecs import grid, ids
from pipeline.cache.format.codecs.scalars import Buffer, decode_counts, decode_float16
from pipeline.cache.format.codecs.weights import above_floor, code_dtype, floors
from pipeline.cache.format.schema import ShardSpec
from pipeline.contracts import FloatArray, TargetMode

MASS_TOLERANCE = 1e-3
"""Largest accepted difference of a row's mass from 1, from an engine's float32 arithmetic or the codecs."""
FLOAT16_RELATIVE_ERROR, FLOAT16_ABSOLUTE_ERROR = 2.0**-11, 2.0**-24


def check_mass(logweight_TK: FloatArray, tail_T: FloatArray, spec: ShardSpec) -> None:
    """Raise ValueError if entries and tail (in mode `unbiased`: the entries) of a row do not sum to 1."""
    with np.errstate(over="ignore"):
        mass_T = np.exp(logweight_TK).sum(axis=1)
        if spec.capture.mode is not TargetMode.UNBIASED:
            mass_T += np.exp(tail_T)
    wrong_T = ~(np.abs(mass_T - 1) <= MASS_TOLERANCE)
    if wrong_T.any():
        row = int(wrong_T.argmax())
        raise ValueError(f"entries and tail of row {row}: expected a mass of 1, got {mass_T[row]:.6g}")


def wrong_mass(
    columns: Mapping[str, Buffer], rows: int, spec: ShardSpec
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return a mask of rows whose stored weights cannot sum to 1 minus the tail mass, [T], and their sums, [T].

    Each code is an interval of weights. A row is wrong if the sum of the upper ends is too small or that of the lower
    ends too large, the float16 error of the tail included. Mode `sampled` stores exact counts, whose missing
    draws are the tail, so no row is wrong that the decoder accepts. Raises ValueError as the decoder does.
    """
    if spec.capture.mode is TargetMode.SAMPLED:
        return np.zeros(rows, np.bool_), np.ones(rows)
    count_T = decode_counts(columns["entry_count"], rows, spec.k)
    valid_TK = np.arange(spec.k) < (np.full(rows, spec.k) if count_T is None else count_T)[:, None]
    value_TK = ids.scatter(np.frombuffer(columns["entry_value"], code_dtype(spec)), (rows, spec.k), valid_TK)
    code_TK = above_floor(value_TK, columns, spec)
    lowest_TK, highest_TK = (_exp(bound).take(code_TK) for bound in grid.cells())
    stored_TK = _exp(grid.levels()).take(code_TK)
    tail_T = np.full(rows, -np.inf)
    if spec.has_tail:
        tail_T = decode_float16(columns["tail_logmass"], (rows,)).astype(np.float64)
    else:
        threshold_T1 = decode_float16(columns["entry_threshold"], (rows, 1))
        at_floor_TK = code_TK >= floors(columns, rows, spec)[:, None]
        lowest_TK = np.where(at_floor_TK, _exp(_lower(threshold_T1)), lowest_TK)
        stored_TK = np.where(at_floor_TK, _exp(threshold_T1), stored_TK)
    lowest_T, stored_T, highest_T = ((p_TK * valid_TK).sum(axis=1) for p_TK in (lowest_TK, stored_TK, highest_TK))
    too_little_T = highest_T < -np.expm1(np.minimum(_upper(tail_T), 0.0)) - MASS_TOLERANCE
    too_much_T = lowest_T > -np.expm1(_lower(tail_T)) + MASS_TOLERANCE
    return too_little_T | too_much_T, stored_T


def _exp(logweight: NDArray[np.floating]) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        return np.exp(logweight.astype(np.float64))


def _lower(log_T: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return a lower bound of a log-value before it was rounded to float16."""
    return log_T * (1 + FLOAT16_RELATIVE_ERROR) - FLOAT16_ABSOLUTE_ERROR


def _upper(log_T: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return an upper bound of a log-value before it was rounded to float16."""
    return log_T * (1 - FLOAT16_RELATIVE_ERROR) + FLOAT16_ABSOLUTE_ERROR
