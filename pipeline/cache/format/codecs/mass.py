"""A row's entries and its tail share out all of the mass, neither more nor less.

The decoder scales every row to what its tail leaves, so a decoded row cannot show that its weights were wrong.
`check_mass` refuses them before they are encoded; `wrong_mass` finds them in what is stored.
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
"""How far from 1 an engine's float32 may leave a row's mass, and codecs a scaled one's."""
HALF_STEP, LEAST_HALF = 2.0**-11, 2.0**-24
"""What rounding to float16 may change: relative, and absolute where values are small."""


def check_mass(logweight_TK: FloatArray, tail_T: FloatArray, spec: ShardSpec) -> None:
    """Raise ValueError where entries and tail do not sum to 1. `unbiased` rows have no tail: their entries must."""
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
    """Where the stored weights cannot have had the mass that the tail leaves, [T], and what they sum to, [T].

    Weights are known to the cells that they were rounded into, and the tail to its float16, so a row is wrong if even
    the largest of these weights sum to too little, or the smallest to too much. `sampled` counts are exact and what
    they miss is the tail: nothing is wrong there that decoding does not refuse. Raises ValueError as decoding does.
    """
    if spec.capture.mode is TargetMode.SAMPLED:
        return np.zeros(rows, np.bool_), np.ones(rows)
    code_TK, valid_TK = _codes(columns, rows, spec)
    least_TK, most_TK = (_exp(cell).take(code_TK) for cell in grid.cells())
    stored_TK = _exp(grid.levels()).take(code_TK)
    tail_T = np.full(rows, -np.inf)
    if spec.has_tail:
        tail_T = decode_float16(columns["tail_logmass"], (rows,)).astype(np.float64)
    else:
        threshold_T1 = decode_float16(columns["entry_threshold"], (rows, 1))
        at_floor_TK = code_TK >= floors(columns, rows, spec)[:, None]
        least_TK = np.where(at_floor_TK, _exp(_lower(threshold_T1)), least_TK)
        stored_TK = np.where(at_floor_TK, _exp(threshold_T1), stored_TK)
    least_T, stored_T, most_T = ((mass_TK * valid_TK).sum(axis=1) for mass_TK in (least_TK, stored_TK, most_TK))
    too_little_T = most_T < -np.expm1(np.minimum(_upper(tail_T), 0.0)) - MASS_TOLERANCE
    too_much_T = least_T > -np.expm1(_lower(tail_T)) + MASS_TOLERANCE
    return too_little_T | too_much_T, stored_T


def _codes(columns: Mapping[str, Buffer], rows: int, spec: ShardSpec) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
    """The code of every entry, and which places of [T, K] hold one."""
    count_T = decode_counts(columns["entry_count"], rows, spec.k)
    valid_TK = np.arange(spec.k) < (np.full(rows, spec.k) if count_T is None else count_T)[:, None]
    value_TK = ids.spread(np.frombuffer(columns["entry_value"], code_dtype(spec)), (rows, spec.k), valid_TK)
    return above_floor(value_TK, columns, spec), valid_TK


def _exp(logweight: NDArray[np.floating]) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):
        mass: NDArray[np.float64] = np.exp(logweight.astype(np.float64))
    return mass


def _lower(log_T: NDArray[np.floating]) -> NDArray[np.floating]:
    """The least that a log-value stored in float16 can have been."""
    return log_T * (1 + HALF_STEP) - LEAST_HALF


def _upper(log_T: NDArray[np.floating]) -> NDArray[np.floating]:
    """The most that a log-value stored in float16 can have been."""
    return log_T * (1 - HALF_STEP) + LEAST_HALF
