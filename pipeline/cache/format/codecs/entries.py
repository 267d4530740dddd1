"""Codec of kept entries: ids sorted and stored as gaps, weights as small integers; decoding sorts by weight again.

Storing a row in the order of its weights would take log2(K!) bits for the order of its ids. Sorted ids take none, and
sorting the decoded entries by falling weight, then by id, restores the order of the entries contract.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.format.codecs import ids
from pipeline.cache.format.codecs.scalars import Buffer, decode_counts, encode_counts
from pipeline.cache.format.codecs.weights import above_floor, code_dtype, decode_weights, encode_weights, scale_rows
from pipeline.cache.format.schema import ShardSpec
from pipeline.contracts import FloatArray, IntArray, TargetMode


def encode_entries(entry_id_TK: IntArray, logweight_TK: FloatArray, spec: ShardSpec) -> dict[str, bytes]:
    """Encode the entry columns: ids without loss, weights to the precision given in `weights`.

    Raises ValueError for entries that violate the contract, since they would decode to different ones.
    """
    _check_contract(entry_id_TK, logweight_TK, 2 ** (8 * spec.id_bytes))
    count_T = np.isfinite(logweight_TK).sum(axis=1)
    valid_TK = _valid(count_T, spec.k)
    common, ranks = ids.rank_ids(entry_id_TK.ravel() if valid_TK is None else entry_id_TK[valid_TK])
    rank_TK = ids.scatter(ranks, entry_id_TK.shape, valid_TK)
    code_TK, columns = encode_weights(logweight_TK, spec)
    value_TK = above_floor(code_TK, columns, spec)
    rank_TK, value_TK = _sorted_by_first(rank_TK, value_TK, valid_TK, 8 * spec.id_bytes, 8 * value_TK.itemsize)
    value = value_TK.ravel() if valid_TK is None else value_TK[valid_TK]
    return {
        "entry_count": encode_counts(count_T, spec.k),
        "entry_value": value.astype(code_dtype(spec)).tobytes(),
        **columns,
        **_plane_columns("common_id", ids.encode_list(common, spec.id_bytes)),
        **_plane_columns("entry_gap", ids.encode_rows(rank_TK, valid_TK, spec.id_bytes)),
    }


def decode_entries(columns: Mapping[str, Buffer], tail_T: FloatArray, spec: ShardSpec) -> tuple[IntArray, FloatArray]:
    """Decode ids and log-weights, [T, K], in contract order. Raises ValueError if the number of bytes is wrong."""
    shape = (len(tail_T), spec.k)
    count_T = decode_counts(columns["entry_count"], len(tail_T), spec.k)
    valid_TK = None if count_T is None else _valid(count_T, spec.k)
    rank_TK = ids.decode_rows(_planes("entry_gap", columns, spec), shape, valid_TK)
    limit = 2 ** (8 * spec.id_bytes) + spec.k  # ranks continue to rise in padding
    id_TK = ids.ids_of(rank_TK, ids.decode_list(_planes("common_id", columns, spec)), limit)
    value_TK = ids.scatter(np.frombuffer(columns["entry_value"], code_dtype(spec)), shape, valid_TK)
    code_TK = above_floor(value_TK, columns, spec)
    code_TK, id_TK = _sorted_by_first(code_TK, id_TK, valid_TK, 8 * code_TK.itemsize, 8 * spec.id_bytes)
    if valid_TK is not None:
        id_TK[~valid_TK] = code_TK[~valid_TK] = 0
    logweight_TK = decode_weights(code_TK, columns, spec)
    if valid_TK is not None:
        logweight_TK[~valid_TK] = -np.inf
    if spec.capture.mode is not TargetMode.SAMPLED:
        scale_rows(logweight_TK, tail_T)
    return id_TK.view(np.int32), logweight_TK


def _check_contract(entry_id_TK: IntArray, logweight_TK: FloatArray, id_limit: int) -> None:
    falling_T = (logweight_TK[:, 1:] <= logweight_TK[:, :-1]).all(axis=1) & (logweight_TK < np.inf).all(axis=1)
    if not falling_T.all():
        raise ValueError(f"entries of row {int(falling_T.argmin())}: expected falling finite log-weights, then -inf")
    least, largest = int(entry_id_TK.min(initial=0)), int(entry_id_TK.max(initial=0))
    if least < 0 or largest >= id_limit:
        raise ValueError(f"entry ids: expected 0..{id_limit - 1}, got {least}..{largest}")


def _valid(count_T: NDArray[np.integer], k: int) -> ids.Valid:
    return None if bool((count_T == k).all()) else np.arange(k) < count_T[:, None]


def _sorted_by_first(
    first_TK: NDArray[np.integer],
    second_TK: NDArray[np.integer],
    valid_TK: ids.Valid,
    first_bits: int,
    second_bits: int,
) -> tuple[ids.U32, ids.U32]:
    """Sort the pairs of each row by first, then second, padding last, as one sort of joined integers."""
    dtype = np.uint32 if first_bits + second_bits <= 32 else np.uint64
    key_TK: NDArray[Any] = first_TK.astype(dtype)
    key_TK <<= dtype(second_bits)
    key_TK |= second_TK.astype(dtype, copy=False)
    if valid_TK is not None:
        key_TK[~valid_TK] = dtype(2 ** (first_bits + second_bits) - 1)
    key_TK.sort(axis=1)
    second_TK = key_TK & dtype(2**second_bits - 1)
    key_TK >>= dtype(second_bits)
    return key_TK.astype(np.uint32, copy=False), second_TK.astype(np.uint32, copy=False)


def _plane_columns(name: str, planes: Sequence[bytes]) -> dict[str, bytes]:
    return {f"{name}_{plane}": data for plane, data in enumerate(planes)}


def _planes(name: str, columns: Mapping[str, Buffer], spec: ShardSpec) -> list[Buffer]:
    return [columns[f"{name}_{plane}"] for plane in range(spec.id_bytes)]
