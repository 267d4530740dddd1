"""Kept entries: sorted ids as gaps, weights as one small code each, rank order had back by a sort.

A row in rank order spends log2(K!) bits on the order of its ids. Sorted ids spend none of them, and the order of the
decoded weights is the rank order up to ties, which the entries contract gives to the lower id.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.codecs.ids import decode_gaps, encode_gaps
from pipeline.cache.codecs.scalars import Buffer, decode_counts, encode_counts
from pipeline.cache.codecs.weights import Codes, code_dtype, decode_weights, encode_weights, scale_rows
from pipeline.cache.schema import ShardSpec
from pipeline.contracts import FloatArray, IntArray, TargetMode


def encode_entries(entry_id_TK: IntArray, logweight_TK: FloatArray, spec: ShardSpec) -> dict[str, bytes]:
    """The entry columns. Ids are exact; the weights' precision is said in `weights`, by target mode."""
    count_T = np.isfinite(logweight_TK).sum(axis=1)
    valid_TK = _valid(count_T, spec.k)
    code_TK, columns = encode_weights(logweight_TK, spec)
    id_TK, code_TK = _sorted_by_first(entry_id_TK, code_TK, valid_TK, 8 * spec.id_bytes, 8 * code_TK.itemsize)
    planes = encode_gaps(id_TK, valid_TK, spec.id_bytes)
    columns["entry_count"] = encode_counts(count_T, spec.k)
    columns["entry_value"] = (code_TK if valid_TK is None else code_TK[valid_TK]).astype(code_dtype(spec)).tobytes()
    return columns | {f"entry_gap_{plane}": data for plane, data in enumerate(planes)}


def decode_entries(columns: Mapping[str, Buffer], tail_T: FloatArray, spec: ShardSpec) -> tuple[IntArray, FloatArray]:
    """Ids and log-weights, [T, K] by the entries contract. Raises ValueError where bytes are missing or too many."""
    shape = (len(tail_T), spec.k)
    count_T = decode_counts(columns["entry_count"], len(tail_T), spec.k)
    valid_TK = None if count_T is None else _valid(count_T, spec.k)
    id_TK = decode_gaps([columns[f"entry_gap_{plane}"] for plane in range(spec.id_bytes)], shape, valid_TK)
    code_TK = _unpacked(np.frombuffer(columns["entry_value"], code_dtype(spec)), shape, valid_TK)
    code_TK, id_TK = _sorted_by_first(code_TK, id_TK, valid_TK, 8 * code_TK.itemsize, 8 * spec.id_bytes)
    logweight_TK = decode_weights(code_TK, columns, tail_T, spec)
    if valid_TK is not None:
        id_TK[~valid_TK] = 0
        logweight_TK[~valid_TK] = -np.inf
    if spec.capture.mode is not TargetMode.SAMPLED:
        scale_rows(logweight_TK, tail_T)
    return id_TK.view(np.int32), logweight_TK


def _valid(count_T: NDArray[np.integer], k: int) -> NDArray[np.bool_] | None:
    """Which places of [T, K] hold an entry, or None where all do."""
    return None if bool((count_T == k).all()) else np.arange(k) < count_T[:, None]


def _sorted_by_first(
    first_TK: NDArray[np.integer],
    second_TK: NDArray[np.integer],
    valid_TK: NDArray[np.bool_] | None,
    first_bits: int,
    second_bits: int,
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Both arrays with every row's pairs in rising order, padding last: one sort of joined integers."""
    joined = np.uint32 if first_bits + second_bits <= 32 else np.uint64
    key_TK: NDArray[Any] = first_TK.astype(joined)
    key_TK <<= joined(second_bits)
    key_TK |= second_TK.astype(joined, copy=False)
    if valid_TK is not None:
        key_TK[~valid_TK] = np.iinfo(joined).max
    key_TK.sort(axis=1)
    second = key_TK & joined((1 << second_bits) - 1)
    key_TK >>= joined(second_bits)
    return key_TK.astype(np.uint32, copy=False), second.astype(np.uint32, copy=False)


def _unpacked(codes: Codes, shape: tuple[int, int], valid_TK: NDArray[np.bool_] | None) -> Codes:
    if valid_TK is None:
        return codes.reshape(shape)
    code_TK = np.zeros(shape, codes.dtype)
    code_TK[valid_TK] = codes
    return code_TK
