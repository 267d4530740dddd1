"""Codec of the weights of kept entries: one small integer an entry, by target mode.

topk, topp   difference between the code (`grid`) of the row's smallest weight, its floor, and the entry's code. The
             floor is stored once a row. The decoder rescales each row to 1 minus its tail mass.
unbiased     the same, with the threshold as floor: it is stored once a row in float16 and is the weight of the entries
             with difference 0. The decoder rescales each row to sum to 1.
sampled      the entry's code: all draws minus the entry's count. Exact.

Codes increase as weights decrease, so that sorting by code sorts by falling weight.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.format.codecs import grid
from pipeline.cache.format.codecs.scalars import Buffer, decode_float16, encode_float16, unsigned_dtype
from pipeline.cache.format.schema import ShardSpec
from pipeline.contracts import FloatArray, TargetMode

Codes = NDArray[np.unsignedinteger]
MIN_SCALED_MASS = 2.0**-10
"""Rows whose entries have less mass than this are not rescaled: 1 minus a float16 tail is too inaccurate there."""


def code_dtype(spec: ShardSpec) -> np.dtype[np.unsignedinteger]:
    """Return the dtype of the spec's codes."""
    sampled = spec.capture.mode is TargetMode.SAMPLED
    return unsigned_dtype(spec.capture.draws) if sampled else np.dtype(np.uint8)


def encode_weights(logweight_TK: FloatArray, spec: ShardSpec) -> tuple[Codes, dict[str, bytes]]:
    """Return the code of every entry, [T, K] (any in padding), and the mode's column with one value a row."""
    if spec.capture.mode is TargetMode.SAMPLED:
        draws = spec.capture.draws
        return (draws - np.rint(np.exp(logweight_TK) * draws)).astype(code_dtype(spec)), {}
    code_TK = grid.quantise(logweight_TK)
    smallest_T = np.where(np.isfinite(logweight_TK), logweight_TK, np.float32(np.inf)).min(axis=1, initial=0.0)
    if spec.capture.mode is not TargetMode.UNBIASED:
        return code_TK, {"entry_floor": grid.quantise(smallest_T).tobytes()}
    floor_T = grid.quantise(smallest_T.astype(np.float16).astype(np.float32))
    return np.minimum(code_TK, floor_T[:, None]), {"entry_threshold": encode_float16(smallest_T)}


def above_floor(code_TK: Codes, columns: Mapping[str, Buffer], spec: ShardSpec) -> Codes:
    """Convert codes to stored values or back: `floor - x` both ways (mode `sampled`: the codes themselves)."""
    if spec.capture.mode is TargetMode.SAMPLED:
        return code_TK
    return floors(columns, len(code_TK), spec)[:, None] - code_TK


def decode_weights(code_TK: Codes, columns: Mapping[str, Buffer], spec: ShardSpec) -> FloatArray:
    """Return the log-weights of codes, [T, K].

    Error before `scale_rows`: half a step of the grid. In mode `unbiased` the threshold's relative error is 2^-11, and
    a head entry with the threshold's code gets the threshold's weight, an error of up to one step. `sampled` is exact.
    Raises ValueError for a count outside 1..draws.
    """
    if spec.capture.mode is TargetMode.SAMPLED:
        if int(code_TK.max(initial=0)) >= spec.capture.draws:
            raise ValueError(f"entry_value: expected counts of 1..{spec.capture.draws}, got 0 or less")
        weight_TK: FloatArray = (spec.capture.draws - code_TK.astype(np.float32)) / np.float32(spec.capture.draws)
        return np.log(weight_TK)
    logweight_TK = grid.levels().take(code_TK, mode="clip")
    if spec.capture.mode is TargetMode.UNBIASED:
        floor_T = floors(columns, len(code_TK), spec)
        threshold_T = decode_float16(columns["entry_threshold"], floor_T.shape)
        logweight_TK = np.where(code_TK < floor_T[:, None], logweight_TK, threshold_T[:, None])
    return logweight_TK


def scale_rows(logweight_TK: FloatArray, tail_T: FloatArray) -> None:
    """Rescale each row in place to sum to 1 minus its tail mass, unless that is less than `MIN_SCALED_MASS`.

    The shift of a row that summed to that before encoding is about the mean error of its largest entries: at most half
    of its largest step, plus 2^-10 for the tail's rounding to float16.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        head_T = -np.expm1(tail_T)
        shift_T = np.log(head_T) - np.log(np.einsum("tk->t", np.exp(logweight_TK)))
    shift_T[(head_T < MIN_SCALED_MASS) | ~np.isfinite(shift_T)] = 0.0
    logweight_TK += shift_T[:, None]


def tail_of_draws(logweight_TK: FloatArray, draws: int) -> FloatArray:
    """Return the tail log-mass in mode `sampled`, [T]: log fraction of the draws whose ids are not among the K.

    -inf where the counts sum to `draws`, or to more, as in a damaged file.
    """
    kept_T = np.rint(np.exp(logweight_TK.astype(np.float64)) * draws).sum(axis=1)
    with np.errstate(divide="ignore"):
        tail_T: FloatArray = np.log(np.maximum(draws - kept_T, 0) / draws).astype(np.float32)
    return tail_T


def floors(columns: Mapping[str, Buffer], rows: int, spec: ShardSpec) -> NDArray[np.uint8]:
    """Return the code of each row's smallest weight, [T]. Raises ValueError if there is not one a row."""
    if spec.capture.mode is TargetMode.UNBIASED:
        return grid.quantise(decode_float16(columns["entry_threshold"], (rows,)))
    return np.frombuffer(columns["entry_floor"], np.uint8).reshape(rows)
