"""float16 scalars, and small integers."""

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import FloatArray

Buffer = bytes | memoryview


def encode_float16(values: FloatArray) -> bytes:
    """Little-endian float16: relative precision 2^-11 down to 6e-5, below it 3e-8 absolute.

    Log-values keep their infinities; a finite one below -65504 becomes -inf, which is the same mass: none.
    """
    with np.errstate(over="ignore"):
        return values.astype("<f2").tobytes()


def decode_float16(data: Buffer, shape: tuple[int, ...]) -> FloatArray:
    """The float32 array of that shape. Raises ValueError where the bytes do not fill it."""
    return np.frombuffer(data, "<f2").reshape(shape).astype(np.float32)


def unsigned_dtype(largest: int) -> np.dtype[np.unsignedinteger]:
    """The narrowest little-endian unsigned type that holds `largest`."""
    return np.dtype(np.min_scalar_type(largest)).newbyteorder("<")


def encode_counts(count_T: NDArray[np.integer], full: int) -> bytes:
    """Counts of 0..full in the narrowest type; nothing at all where every row is full."""
    return b"" if bool((count_T == full).all()) else count_T.astype(unsigned_dtype(full)).tobytes()


def decode_counts(data: Buffer, rows: int, full: int) -> NDArray[np.int64] | None:
    """The counts, or None where every row is full. Raises ValueError where they are not one a row in 0..full."""
    if len(data) == 0:
        return None
    count_T = np.frombuffer(data, unsigned_dtype(full)).astype(np.int64)
    if len(count_T) != rows or int(count_T.max(initial=0)) > full:
        raise ValueError(f"expected {rows} counts of at most {full}, got {len(count_T)}")
    return count_T
