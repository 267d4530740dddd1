"""Lossless codec of token ids: a list of the sequence's common ids, then each row's sorted ranks as gaps.

The rows of a sequence share most of their ids. The ids that occur more than once in it, its common ids, are swapped by
falling frequency with the first ids of the vocabulary. The rank of an id is its index in that permutation. Rows are
sorted by rank and stored as gaps between ranks, which are small.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.format.codecs.scalars import Buffer

U32 = NDArray[np.uint32]
Ranks = NDArray[np.unsignedinteger]
"""uint16 if ids take two bytes or less, else uint32."""
_FOUR_ONES = np.uint64(0x0001_0001_0001_0001)
Valid = NDArray[np.bool_] | None
"""Mask [T, K] of valid entries (a prefix of each row), the others being padding; None if all are valid."""


def rank_ids(ids: NDArray[np.integer]) -> tuple[U32, U32]:
    """Return the common ids by rank, and the rank of each of `ids`, both flat.

    Frequencies are compared by their power of two, so that the list consists of a few rising runs, which compress well.
    """
    sorted_ids = np.sort(ids.astype(np.uint32))
    start = np.flatnonzero(np.diff(sorted_ids, prepend=sorted_ids[:1] + np.uint32(1)))
    count = np.diff(start, append=len(ids))
    repeated, frequency = sorted_ids[start[count > 1]], count[count > 1]
    common = repeated[np.argsort(-np.frexp(frequency)[1], kind="stable")]
    rank = _identity(int(sorted_ids[-1:].max(initial=0)) + 1)
    displaced, new_rank = _swapped(common)
    rank[common] = np.arange(len(common), dtype=np.uint32)
    rank[displaced] = new_rank
    return common, rank.take(ids)


def ids_of(rank_TK: Ranks, common: Ranks, limit: int = 1 << 32) -> U32:
    """Return the ids of ranks, the inverse of `rank_ids`. Raises ValueError for a rank of `limit` or more."""
    ranks = max(int(rank_TK.max(initial=0)) + 1, len(common))
    if ranks > limit:  # only in damaged files; would allocate that many ids
        raise ValueError(f"ranks of ids: expected less than {limit}, got {ranks - 1}")
    id_of = _identity(ranks)
    displaced, new_rank = _swapped(common)
    used = np.searchsorted(new_rank, len(id_of))
    id_of[new_rank[:used]] = displaced[:used]
    id_of[: len(common)] = common
    return id_of.take(rank_TK, mode="clip")


def _swapped(common: Ranks) -> tuple[NDArray[np.intp], Ranks]:
    """Return the ids that common ids displace, and their ranks, which are the ids of those common ids; both rising."""
    rising = np.sort(common)
    low = np.searchsorted(rising, len(common))
    displaced = np.ones(len(common), np.bool_)
    displaced[rising[:low]] = False
    return np.flatnonzero(displaced), rising[low:]


def _identity(count: int) -> U32:
    """Return a writable `arange(count)`, copied from a cached one, which is faster."""
    return _cached_arange(count | 0xFFFF)[:count].copy()


@lru_cache(maxsize=1)
def _cached_arange(count: int) -> U32:
    return np.arange(count, dtype=np.uint32)


def encode_list(values: U32, planes: int) -> list[bytes]:
    """Encode differences modulo 2^(8 planes), byte `p` of each in plane `p`."""
    return _planes(np.diff(values, prepend=np.uint32(0)), planes)


def decode_list(planes: Sequence[Buffer]) -> Ranks:
    """Decode the values. Raises ValueError if the planes differ in length."""
    values = _joined(planes, len(planes[0]))
    np.add.accumulate(values, out=values)
    values &= values.dtype.type(2 ** (8 * len(planes)) - 1)
    return values


def encode_rows(rank_TK: U32, valid_TK: Valid, planes: int) -> list[bytes]:
    """Encode the gap before each of a row's rising ranks (ranks in between), byte `p` of each in plane `p`.

    Raises ValueError if a row contains an id twice.
    """
    twice_TK = rank_TK[:, 1:] == rank_TK[:, :-1]
    if (twice_TK if valid_TK is None else twice_TK & valid_TK[:, 1:]).any():
        raise ValueError("entry ids: expected every id once in a row")
    gap_TK = rank_TK.copy()
    gap_TK[:, 1:] -= rank_TK[:, :-1] + np.uint32(1)
    return _planes(gap_TK.ravel() if valid_TK is None else gap_TK[valid_TK], planes)


def decode_rows(planes: Sequence[Buffer], shape: tuple[int, int], valid_TK: Valid) -> Ranks:
    """Decode rising ranks, [T, K], any in padding. Raises ValueError for a wrong number of bytes or an overflow."""
    entries = shape[0] * shape[1] if valid_TK is None else int(valid_TK.sum())
    rank_TK = scatter(_joined(planes, entries), shape, valid_TK)
    rank_TK += rank_TK.dtype.type(1)  # gap 0 is the next rank
    accumulate_rows(rank_TK)
    rank_TK -= rank_TK.dtype.type(1)
    if _overflows(rank_TK.ravel(), shape[1], valid_TK):
        raise ValueError(f"ranks of ids: expected less than {2 ** (8 * rank_TK.itemsize)}, got more")
    return rank_TK


def _overflows(ranks: Ranks, k: int, valid_TK: Valid) -> bool:
    """Return whether a row of K does not rise up to its padding, which shows an overflow."""
    falls = ranks[1:] <= ranks[:-1]
    falls[k - 1 :: k] = False  # between rows
    return bool((falls if valid_TK is None else falls & valid_TK.ravel()[1:]).any())


def accumulate_rows(value_TK: Ranks) -> None:
    """Replace rows by their cumulative sums, in place. Values after an overflow in a row are wrong.

    Faster than `np.add.accumulate`, whose additions depend on each other: multiplying a 64-bit word of four 16-bit
    values by 1 + 2^16 + 2^32 + 2^48 gives their four cumulative sums. The words' totals are summed recursively.
    """
    if value_TK.dtype != np.uint16 or value_TK.shape[1] % 4 or not value_TK.size:
        np.add.accumulate(value_TK, axis=1, out=value_TK)
        return
    word_TG = value_TK.view(np.uint64)
    word_TG *= _FOUR_ONES
    total_TG = (word_TG >> np.uint64(48)).astype(np.uint16)
    before_TG = total_TG.copy()
    accumulate_rows(before_TG)
    before_TG -= total_TG
    word_TG += before_TG * _FOUR_ONES


def scatter(
    values: NDArray[np.unsignedinteger], shape: tuple[int, int], valid_TK: Valid
) -> NDArray[np.unsignedinteger]:
    """Return stored entries as [T, K], 0 in padding."""
    if valid_TK is None:
        return values.reshape(shape)
    scattered_TK = np.zeros(shape, values.dtype)
    scattered_TK[valid_TK] = values
    return scattered_TK


def _planes(values: U32, planes: int) -> list[bytes]:
    parts = values.astype("<u4", copy=False).view(np.uint8).reshape(-1, 4)
    return [parts[:, plane].tobytes() for plane in range(planes)]


def _joined(planes: Sequence[Buffer], length: int) -> Ranks:
    parts = [np.frombuffer(data, np.uint8) for data in planes]
    if any(len(part) != length for part in parts):
        raise ValueError(f"planes of ids: expected {length} bytes each, got {[len(part) for part in parts]}")
    values: Ranks = parts[-1].astype(np.uint16 if len(planes) <= 2 else np.uint32)
    for part in reversed(parts[:-1]):
        values <<= values.dtype.type(8)
        np.bitwise_or(values, part, out=values)
    return values
