"""Codecs of float16 scalars and of small integers."""

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import FloatArray

Buffer = bytes | memoryview


def encode_float16(values: FloatArray) -> bytes:
    """Encode as little-endian float16: relative error 2^-11 down to 6e-5, absolute error 3e-8 below.

    Infinities are kept; a log-value below -65504 becomes -inf, which is zero mass as well.
    """
    with np.errstate(over="ignore"):
        return values.astype("<f2").tobytes()


def decode_float16(data: Buffer, shape: tuple[int, ...]) -> FloatArray:
    """Decode to float32 of that shape. Raises ValueError if the number of bytes is wrong."""
    return np.frombuffer(data, "<f2").reshape(shape).astype(np.float32)


def unsigned_dtype(largest: int) -> np.dtype[np.unsignedinteger]:
    """Return the narrowest little-endian unsigned dtype that holds `largest`."""
    return np.dtype(np.min_scalar_type(largest)).newbyteorder("<")


def encode_counts(count_T: NDArray[np.integer], full: int) -> bytes:
    """Encode counts of 0..full in the narrowest dtype; no bytes if all are `full`."""
    return b"" if bool((count_T == full).all()) else count_T.astype(unsigned_dtype(full)).tobytes()


def decode_counts(data: Buffer, rows: int, full: int) -> NDArray[np.int64] | None:
    """Decode counts, [rows]; None if all are `full`. Raises ValueError for other than `rows` counts of 0..full."""
    if len(data) == 0:
        return None
    count_T = np.frombuffer(data, unsigned_dtype(full)).astype(np.int64)
    largest = int(count_T.max(initial=0))
    if len(count_T) != rows or largest > full:
        raise ValueError(f"expected {rows} counts of at most {full}, got {len(count_T)} of at most {largest}")
    return count_T
