"""Token ids of a sequence: a list of the ids that it repeats, then sorted rows as gaps.

Neighbouring positions keep much the same ids, and a text has its own vocabulary. So the ids that a sequence holds more
than once, by falling frequency, change places with the first ids of the vocabulary. An id's rank is its place then, and
rows are sorted and stored as the gaps between ranks, which are small. Lossless for any vocabulary.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.format.codecs.scalars import Buffer

U32 = NDArray[np.uint32]
Ranks = NDArray[np.unsignedinteger]
"""uint16 where ids take two bytes or less, else uint32."""
_FOUR_ONES = np.uint64(0x0001_0001_0001_0001)
Valid = NDArray[np.bool_] | None
"""Which places of [T, K] hold an entry (a prefix of each row); None where all do."""


def rank_ids(ids: NDArray[np.integer]) -> tuple[U32, U32]:
    """(common ids by rank, the rank of each of `ids`), both flat.

    Frequencies count as equal within a power of two, so that the list is a few rising runs, which are cheap to store.
    """
    sorted_ids = np.sort(ids.astype(np.uint32))
    start = np.flatnonzero(np.diff(sorted_ids, prepend=sorted_ids[:1] + np.uint32(1)))
    count = np.diff(start, append=len(ids))
    repeated, often = sorted_ids[start[count > 1]], count[count > 1]
    common = repeated[np.argsort(-np.frexp(often)[1], kind="stable")]
    rank = _places(int(sorted_ids[-1:].max(initial=0)) + 1)
    moved, place = _exchanged(common)
    rank[common] = np.arange(len(common), dtype=np.uint32)
    rank[moved] = place
    return common, rank.take(ids)


def ids_of(rank_TK: Ranks, common: Ranks, most: int = 1 << 32) -> U32:
    """The ids of those ranks: the inverse of `rank_ids`. Raises ValueError where a rank is not below `most`."""
    ranks = max(int(rank_TK.max(initial=0)) + 1, len(common))
    if ranks > most:  # only damage says so, and memory would be asked for as many
        raise ValueError(f"ranks of ids: expected less than {most}, got {ranks - 1}")
    id_of = _places(ranks)
    moved, place = _exchanged(common)
    used = np.searchsorted(place, len(id_of))
    id_of[place[:used]] = moved[:used]
    id_of[: len(common)] = common
    return id_of.take(rank_TK, mode="clip")


def _exchanged(common: Ranks) -> tuple[NDArray[np.intp], Ranks]:
    """The ids that make room for common ones and their new places, which common ones have left; both rising."""
    rising = np.sort(common)
    stay = np.searchsorted(rising, len(common))
    makes_room = np.ones(len(common), np.bool_)
    makes_room[rising[:stay]] = False
    return np.flatnonzero(makes_room), rising[stay:]


def _places(count: int) -> U32:
    """0, 1, 2, ..., to be written to."""
    return _counting(count | 0xFFFF)[:count].copy()


@lru_cache(maxsize=1)
def _counting(count: int) -> U32:
    """Kept, since counting takes longer than copying."""
    return np.arange(count, dtype=np.uint32)


def encode_list(values: U32, planes: int) -> list[bytes]:
    """Differences modulo 2^(8 planes), byte `p` of each in plane `p`."""
    return _planes(np.diff(values, prepend=np.uint32(0)), planes)


def decode_list(planes: Sequence[Buffer]) -> Ranks:
    """The values of `encode_list`. Raises ValueError where the planes are not of one length."""
    values = _joined(planes, len(planes[0]))
    np.add.accumulate(values, out=values)
    values &= values.dtype.type(2 ** (8 * len(planes)) - 1)
    return values


def encode_rows(rank_TK: U32, valid_TK: Valid, planes: int) -> list[bytes]:
    """How many ranks are skipped before each of a row's rising ranks, byte `p` of each in plane `p`.

    Raises ValueError where a row holds an id twice.
    """
    twice_TK = rank_TK[:, 1:] == rank_TK[:, :-1]
    if (twice_TK if valid_TK is None else twice_TK & valid_TK[:, 1:]).any():
        raise ValueError("entry ids: expected every id once in a row")
    gap_TK = rank_TK.copy()
    gap_TK[:, 1:] -= rank_TK[:, :-1] + np.uint32(1)
    return _planes(gap_TK.ravel() if valid_TK is None else gap_TK[valid_TK], planes)


def decode_rows(planes: Sequence[Buffer], shape: tuple[int, int], valid_TK: Valid) -> Ranks:
    """The rising ranks, [T, K], anything in padding. Raises ValueError where bytes are missing, too many or damaged."""
    entries = shape[0] * shape[1] if valid_TK is None else int(valid_TK.sum())
    rank_TK = spread(_joined(planes, entries), shape, valid_TK)
    rank_TK += rank_TK.dtype.type(1)  # a gap of 0 leads to the next rank
    add_up_rows(rank_TK)
    rank_TK -= rank_TK.dtype.type(1)
    if _falls(rank_TK.ravel(), shape[1], valid_TK):
        raise ValueError(f"ranks of ids: expected less than {2 ** (8 * rank_TK.itemsize)}, got more")
    return rank_TK


def _falls(ranks: Ranks, k: int, valid_TK: Valid) -> bool:
    """Whether some row of K stops rising before its padding, as sums do that overflow."""
    falls = ranks[1:] <= ranks[:-1]
    falls[k - 1 :: k] = False  # from one row to the next
    return bool((falls if valid_TK is None else falls & valid_TK.ravel()[1:]).any())


def add_up_rows(value_TK: Ranks) -> None:
    """Replace every value by the sum of its row up to it, in place. In a row that overflows, later values are wrong.

    numpy adds one value after the other, each waiting for the last to be stored. Multiplied by 1 + 2^16 + 2^32 + 2^48,
    a word of four 16-bit values is its own four running sums; the words' totals are added up in the same way.
    """
    if value_TK.dtype != np.uint16 or value_TK.shape[1] % 4 or not value_TK.size:
        np.add.accumulate(value_TK, axis=1, out=value_TK)
        return
    word_TG = value_TK.view(np.uint64)
    word_TG *= _FOUR_ONES
    total_TG = (word_TG >> np.uint64(48)).astype(np.uint16)
    before_TG = total_TG.copy()
    add_up_rows(before_TG)
    before_TG -= total_TG
    word_TG += before_TG * _FOUR_ONES


def spread(values: NDArray[np.unsignedinteger], shape: tuple[int, int], valid_TK: Valid) -> NDArray[np.unsignedinteger]:
    """Stored entries in their places of [T, K], 0 in padding."""
    if valid_TK is None:
        return values.reshape(shape)
    spread_TK = np.zeros(shape, values.dtype)
    spread_TK[valid_TK] = values
    return spread_TK


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
