"""Kept entries: sorted ids as gaps, weights as one small number each, rank order had back by a sort.

A row in rank order spends log2(K!) bits on the order of its ids. Sorted ids spend none of them, and the order of the
decoded weights is the rank order up to ties, which the entries contract gives to the lower id.
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
    """The entry columns. Ids are exact; the weights' precision is said in `weights`, by target mode.

    Raises ValueError where the entries break their contract, since what is stored would then decode to others.
    """
    _check_contract(entry_id_TK, logweight_TK, 2 ** (8 * spec.id_bytes))
    count_T = np.isfinite(logweight_TK).sum(axis=1)
    valid_TK = _valid(count_T, spec.k)
    common, rank_TK = _ranked(entry_id_TK, valid_TK)
    code_TK, columns = encode_weights(logweight_TK, spec)
    value_TK = above_floor(code_TK, columns, spec)
    rank_TK, value_TK = _sorted_by_first(rank_TK, value_TK, valid_TK, 8 * spec.id_bytes, 8 * value_TK.itemsize)
    value = value_TK.ravel() if valid_TK is None else value_TK[valid_TK]
    return {
        "entry_count": encode_counts(count_T, spec.k),
        "entry_value": value.astype(code_dtype(spec)).tobytes(),
        **columns,
        **_named("common_id", ids.encode_list(common, spec.id_bytes)),
        **_named("entry_gap", ids.encode_rows(rank_TK, valid_TK, spec.id_bytes)),
    }


def decode_entries(columns: Mapping[str, Buffer], tail_T: FloatArray, spec: ShardSpec) -> tuple[IntArray, FloatArray]:
    """Ids and log-weights, [T, K] by the entries contract. Raises ValueError where bytes are missing or too many."""
    shape = (len(tail_T), spec.k)
    count_T = decode_counts(columns["entry_count"], len(tail_T), spec.k)
    valid_TK = None if count_T is None else _valid(count_T, spec.k)
    rank_TK = ids.decode_rows(_planes("entry_gap", columns, spec), shape, valid_TK)
    most = 2 ** (8 * spec.id_bytes) + spec.k  # in padding ranks go on rising
    id_TK = ids.ids_of(rank_TK, ids.decode_list(_planes("common_id", columns, spec)), most)
    value_TK = ids.spread(np.frombuffer(columns["entry_value"], code_dtype(spec)), shape, valid_TK)
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


def _check_contract(entry_id_TK: IntArray, logweight_TK: FloatArray, ids_that_fit: int) -> None:
    falling_T = (logweight_TK[:, 1:] <= logweight_TK[:, :-1]).all(axis=1) & (logweight_TK < np.inf).all(axis=1)
    if not falling_T.all():
        raise ValueError(f"entries of row {int(falling_T.argmin())}: expected finite log-weights that fall, then -inf")
    least, largest = int(entry_id_TK.min(initial=0)), int(entry_id_TK.max(initial=0))
    if least < 0 or largest >= ids_that_fit:
        raise ValueError(f"entry ids: expected 0..{ids_that_fit - 1}, got {least}..{largest}")


def _valid(count_T: NDArray[np.integer], k: int) -> ids.Valid:
    return None if bool((count_T == k).all()) else np.arange(k) < count_T[:, None]


def _ranked(entry_id_TK: IntArray, valid_TK: ids.Valid) -> tuple[ids.U32, ids.U32]:
    """The common ids and every entry's rank, [T, K], 0 in padding."""
    common, ranks = ids.rank_ids(entry_id_TK.ravel() if valid_TK is None else entry_id_TK[valid_TK])
    return common, ids.spread(ranks, entry_id_TK.shape, valid_TK)


def _sorted_by_first(
    first_TK: NDArray[np.integer],
    second_TK: NDArray[np.integer],
    valid_TK: ids.Valid,
    first_bits: int,
    second_bits: int,
) -> tuple[ids.U32, ids.U32]:
    """Both arrays with every row's pairs in rising order, padding last: one sort of joined integers."""
    joined = np.uint32 if first_bits + second_bits <= 32 else np.uint64
    key_TK: NDArray[Any] = first_TK.astype(joined)
    key_TK <<= joined(second_bits)
    key_TK |= second_TK.astype(joined, copy=False)
    if valid_TK is not None:
        key_TK[~valid_TK] = joined(2 ** (first_bits + second_bits) - 1)
    key_TK.sort(axis=1)
    second_TK = key_TK & joined(2**second_bits - 1)
    key_TK >>= joined(second_bits)
    return key_TK.astype(np.uint32, copy=False), second_TK.astype(np.uint32, copy=False)


def _named(name: str, planes: Sequence[bytes]) -> dict[str, bytes]:
    return {f"{name}_{plane}": data for plane, data in enumerate(planes)}


def _planes(name: str, columns: Mapping[str, Buffer], spec: ShardSpec) -> list[Buffer]:
    return [columns[f"{name}_{plane}"] for plane in range(spec.id_bytes)]
