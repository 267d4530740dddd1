"""Codecs of hidden states: lossless bfloat16, or int8 with one scale a channel."""

import numpy as np

from pipeline.bfloat16 import to_bfloat16, to_float32
from pipeline.cache.format.codecs.scalars import Buffer
from pipeline.contracts import Bf16Array


def encode_bfloat16(state_TD: Bf16Array) -> bytes:
    """Encode without loss: all low bytes, then all high bytes (signs and exponents, which zstd compresses well)."""
    pairs = np.ascontiguousarray(state_TD, "<u2").view(np.uint8).reshape(-1, 2)
    return pairs.T.tobytes()


def decode_bfloat16(data: Buffer, rows: int, width: int) -> Bf16Array:
    """Decode states, [rows, width]. Raises ValueError if the number of bytes is wrong."""
    planes = np.frombuffer(data, np.uint8).reshape(2, rows * width)
    return np.ascontiguousarray(planes.T).view("<u2").reshape(rows, width)


def encode_int8(state_TD: Bf16Array) -> bytes:
    """Encode as one float32 scale a channel (its largest magnitude in the sequence / 127), then int8.

    Error: at most half a scale, then rounding to bfloat16. With a scale per token, the few channels of very large
    magnitude would take the precision of all others. Raises ValueError for states that are not finite.
    """
    values_TD = to_float32(state_TD)
    if not np.isfinite(values_TD).all():
        raise ValueError("hidden states: expected finite values for int8, got NaN or infinity")
    scale_D = np.abs(values_TD).max(axis=0, initial=0.0) / np.float32(127)
    steps_TD = np.divide(values_TD, scale_D, out=np.zeros_like(values_TD), where=scale_D > 0)
    return bytes(scale_D.astype("<f4").tobytes() + np.rint(steps_TD).astype(np.int8).tobytes())


def decode_int8(data: Buffer, rows: int, width: int) -> Bf16Array:
    """Decode states, [rows, width]. Raises ValueError if the number of bytes is wrong."""
    scale_D = np.frombuffer(data, "<f4", count=width)
    steps_TD = np.frombuffer(data, np.int8, offset=4 * width).reshape(rows, width)
    return to_bfloat16(steps_TD * scale_D)
