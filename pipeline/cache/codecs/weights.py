"""Weights of kept entries as codes that rise as weights fall, for each target mode.

topk, topp   the grid's level; the decoder then scales every row so that its mass is exactly what the tail leaves.
unbiased     the grid's level for head entries, 255 for the entries that share the threshold, whose log is kept
             once a row in float16; the decoder then scales every row to sum to 1.
sampled      draws minus the entry's count: exact.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codecs import grid
from pipeline.cache.codecs.scalars import Buffer, decode_float16, encode_float16, unsigned_dtype
from pipeline.cache.schema import ShardSpec
from pipeline.contracts import FloatArray, TargetMode

Codes = NDArray[np.unsignedinteger]
LEAST_HEAD = 2.0**-10
"""Rows that keep less than this share are not scaled: float16's tail says too little about what is left."""
_THRESHOLD_CODE = 255


def code_dtype(spec: ShardSpec) -> np.dtype[np.unsignedinteger]:
    """The type of the spec's codes."""
    sampled = spec.capture.mode is TargetMode.SAMPLED
    return unsigned_dtype(spec.capture.draws) if sampled else np.dtype(np.uint8)


def encode_weights(logweight_TK: FloatArray, spec: ShardSpec) -> tuple[Codes, dict[str, bytes]]:
    """The code of every entry, and the mode's other columns. Padding (-inf) gets some code."""
    if spec.capture.mode is TargetMode.SAMPLED:
        draws = spec.capture.draws
        count_TK = np.rint(np.exp(logweight_TK) * draws)
        return (draws - count_TK).astype(code_dtype(spec)), {}
    code_TK = grid.quantise(logweight_TK)
    if spec.capture.mode is not TargetMode.UNBIASED:
        return code_TK, {}
    threshold_T = np.where(np.isfinite(logweight_TK), logweight_TK, np.inf).min(axis=1, initial=np.inf)
    return _mark_threshold(code_TK, logweight_TK, threshold_T), {"entry_threshold": encode_float16(threshold_T)}


def decode_weights(code_TK: Codes, columns: Mapping[str, Buffer], tail_T: FloatArray, spec: ShardSpec) -> FloatArray:
    """Log-weights of the codes.

    Precision against what was encoded, where that row summed to 1: half the grid's step at the entry, plus the
    scaling, which is at most half the row's widest step and is about the mean error of its heavy entries.
    Rows with a tail that is read from float16 add 2^-10. `sampled` is exact.
    """
    if spec.capture.mode is TargetMode.SAMPLED:
        share_TK: FloatArray = (spec.capture.draws - code_TK.astype(np.float32)) / np.float32(spec.capture.draws)
        return np.log(share_TK)
    logweight_TK = _levels()[code_TK]
    if spec.capture.mode is TargetMode.UNBIASED:
        threshold_T = decode_float16(columns["entry_threshold"], tail_T.shape)
        np.maximum(logweight_TK, threshold_T[:, None], out=logweight_TK)
    return logweight_TK


def scale_rows(logweight_TK: FloatArray, tail_T: FloatArray) -> None:
    """Scale each row in place so that it sums to 1 minus the tail's mass, unless that is under `LEAST_HEAD`."""
    head_T = -np.expm1(tail_T)
    with np.errstate(divide="ignore"):
        shift_T = np.log(head_T) - np.log(np.exp(logweight_TK).sum(axis=1))
    shift_T[(head_T < LEAST_HEAD) | ~np.isfinite(shift_T)] = 0.0
    logweight_TK += shift_T[:, None]


def _mark_threshold(code_TK: Codes, logweight_TK: FloatArray, threshold_T: FloatArray) -> Codes:
    """Give entries at the threshold its code, and every head entry a level above it."""
    level_TK = grid.levels()[code_TK]
    low_TK = (level_TK <= threshold_T.astype(np.float16)[:, None]) & (code_TK > 0)
    code_TK = code_TK - low_TK.astype(np.uint8)
    code_TK[logweight_TK == threshold_T[:, None]] = _THRESHOLD_CODE
    return code_TK


def _levels() -> FloatArray:
    return np.append(grid.levels(), np.float32(-np.inf))
