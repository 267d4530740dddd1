"""Weights of kept entries as one small number each, for each target mode.

topk, topp   the grid's level, counted up from the level of the row's least weight, which is stored once a row.
             The decoder scales every row so that its mass is exactly what the tail leaves.
unbiased     the same, counted up from the level of the threshold, which is stored once a row in float16 and is the
             weight of all entries counted 0. The decoder scales every row to sum to 1.
sampled      draws minus the entry's own count: exact.

Inside this package a code rises as the weight falls, so that sorting codes sorts weights.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.format.codecs import grid
from pipeline.cache.format.codecs.scalars import Buffer, decode_float16, encode_float16, unsigned_dtype
from pipeline.cache.format.schema import ShardSpec
from pipeline.contracts import FloatArray, TargetMode

Codes = NDArray[np.unsignedinteger]
LEAST_HEAD = 2.0**-10
"""Rows that keep less than this share are not scaled: float16's tail says too little about what is left."""


def code_dtype(spec: ShardSpec) -> np.dtype[np.unsignedinteger]:
    """The type of the spec's codes."""
    sampled = spec.capture.mode is TargetMode.SAMPLED
    return unsigned_dtype(spec.capture.draws) if sampled else np.dtype(np.uint8)


def encode_weights(logweight_TK: FloatArray, spec: ShardSpec) -> tuple[Codes, dict[str, bytes]]:
    """The code of every entry, and the mode's column of one value a row. Padding (-inf) gets some code."""
    if spec.capture.mode is TargetMode.SAMPLED:
        draws = spec.capture.draws
        return (draws - np.rint(np.exp(logweight_TK) * draws)).astype(code_dtype(spec)), {}
    code_TK = grid.quantise(logweight_TK)
    least_T = np.where(np.isfinite(logweight_TK), logweight_TK, np.float32(np.inf)).min(axis=1, initial=0.0)
    if spec.capture.mode is not TargetMode.UNBIASED:
        return code_TK, {"entry_floor": grid.quantise(least_T).tobytes()}
    floor_T = grid.quantise(least_T.astype(np.float16).astype(np.float32))
    return np.minimum(code_TK, floor_T[:, None]), {"entry_threshold": encode_float16(least_T)}


def above_floor(code_TK: Codes, columns: Mapping[str, Buffer], spec: ShardSpec) -> Codes:
    """From codes to the numbers that are stored, and back: both count from the row's floor."""
    if spec.capture.mode is TargetMode.SAMPLED:
        return code_TK
    return floors(columns, len(code_TK), spec)[:, None] - code_TK


def decode_weights(code_TK: Codes, columns: Mapping[str, Buffer], spec: ShardSpec) -> FloatArray:
    """Log-weights of the codes.

    Precision before `scale_rows`: half the grid's step. In `unbiased` mode 2^-11 of its log for the threshold, and a
    whole step for a head entry that falls in the threshold's cell and so takes its weight. `sampled` is exact.
    Raises ValueError for a count that no row can hold.
    """
    if spec.capture.mode is TargetMode.SAMPLED:
        if int(code_TK.max(initial=0)) >= spec.capture.draws:
            raise ValueError(f"entry_value: expected counts of 1..{spec.capture.draws}, got another")
        share_TK: FloatArray = (spec.capture.draws - code_TK.astype(np.float32)) / np.float32(spec.capture.draws)
        return np.log(share_TK)
    logweight_TK = grid.levels().take(code_TK, mode="clip")
    if spec.capture.mode is TargetMode.UNBIASED:
        floor_T = floors(columns, len(code_TK), spec)
        threshold_T = decode_float16(columns["entry_threshold"], floor_T.shape)
        logweight_TK = np.where(code_TK < floor_T[:, None], logweight_TK, threshold_T[:, None])
    return logweight_TK


def scale_rows(logweight_TK: FloatArray, tail_T: FloatArray) -> None:
    """Scale each row in place so that it sums to 1 minus the tail's mass, unless that is under `LEAST_HEAD`.

    The shift is about the mean error of the row's heavy entries: at most half the row's widest step where the encoded
    row summed to 1 minus the tail's mass, and 2^-10 for the tail's own rounding to float16.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        head_T = -np.expm1(tail_T)
        shift_T = np.log(head_T) - np.log(np.einsum("tk->t", np.exp(logweight_TK)))
    shift_T[(head_T < LEAST_HEAD) | ~np.isfinite(shift_T)] = 0.0
    logweight_TK += shift_T[:, None]


def missed_draws(logweight_TK: FloatArray, draws: int) -> FloatArray:
    """`sampled` only: the log-share of the draws whose ids did not fit in K entries, [T]; -inf where all did."""
    missed_T = draws - np.rint(np.exp(logweight_TK.astype(np.float64)) * draws).sum(axis=1)
    with np.errstate(divide="ignore"):
        share_T: FloatArray = np.log(missed_T / draws).astype(np.float32)
    return share_T


def floors(columns: Mapping[str, Buffer], rows: int, spec: ShardSpec) -> NDArray[np.uint8]:
    """The code of each row's least weight. Raises ValueError where there is not one a row."""
    if spec.capture.mode is TargetMode.UNBIASED:
        return grid.quantise(decode_float16(columns["entry_threshold"], (rows,)))
    return np.frombuffer(columns["entry_floor"], np.uint8).reshape(rows)
