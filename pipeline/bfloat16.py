"""Conversions between float32 and bfloat16, which is stored and exchanged as uint16 bits (`contracts.Bf16Array`)."""

import ml_dtypes
import numpy as np

from pipeline.contracts import Bf16Array, FloatArray


def to_float32(bits: Bf16Array) -> FloatArray:
    """Return the float32 values of bfloat16 bits; exact."""
    values: FloatArray = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    return values


def to_bfloat16(values: FloatArray) -> Bf16Array:
    """Return the bfloat16 bits of float32 values, rounded to nearest even. NaN becomes a quiet NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        bits: Bf16Array = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return bits
