"""Token ids of a row, sorted and stored as gaps, the bytes of all gaps apart in planes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codecs.scalars import Buffer


def encode_gaps(id_TK: NDArray[np.unsignedinteger], valid_TK: NDArray[np.bool_] | None, planes: int) -> list[bytes]:
    """Lossless, any vocabulary below 2^(8 planes): byte `p` of every gap, for each plane.

    Ids rise along each row; a gap is the number of ids skipped, the first one counted from 0. Where `valid_TK` is
    given, only its entries (a prefix of each row) are stored.
    """
    gap_TK = id_TK.copy()
    gap_TK[:, 1:] -= id_TK[:, :-1] + np.asarray(1, id_TK.dtype)
    gaps = gap_TK.ravel() if valid_TK is None else gap_TK[valid_TK]
    parts = gaps.astype("<u4", copy=False).view(np.uint8).reshape(-1, 4)
    return [parts[:, plane].tobytes() for plane in range(planes)]


def decode_gaps(
    planes: Sequence[Buffer], shape: tuple[int, int], valid_TK: NDArray[np.bool_] | None
) -> NDArray[np.uint32]:
    """The rising ids, [T, K]; padding repeats nothing in particular. Raises ValueError where bytes are missing."""
    entries = shape[0] * shape[1] if valid_TK is None else int(valid_TK.sum())
    gaps = np.zeros(entries, np.uint32)
    for plane, data in enumerate(planes):
        part = np.frombuffer(data, np.uint8)
        if len(part) != entries:
            raise ValueError(f"entry_gap_{plane}: expected {entries} bytes, got {len(part)}")
        gaps |= part.astype(np.uint32) << np.uint32(8 * plane)
    gaps += 1
    if valid_TK is None:
        step_TK = gaps.reshape(shape)
    else:
        step_TK = np.zeros(shape, np.uint32)
        step_TK[valid_TK] = gaps
    ids = np.cumsum(step_TK, axis=1, dtype=np.uint32)
    ids -= 1
    return ids
