"""Decoded rows as Arrow tables of standard types: one row per sequence, or one row per position with lists."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.bfloat16 import to_float32
from pipeline.cache.format.schema import ShardSpec
from pipeline.contracts import ScoredSequence


def sequence_table(rows: list[ScoredSequence]) -> pa.Table:
    """Build a table with one row per sequence."""
    sequences = [row.sequence for row in rows]
    return pa.table(
        {
            "sequence_id": pa.array([s.sequence_id for s in sequences], pa.string()),
            "document_id": pa.array([s.document_id for s in sequences], pa.string()),
            "domain": pa.array([s.domain for s in sequences], pa.string()),
            "split": pa.array([s.split for s in sequences], pa.string()),
            "audited": pa.array([s.audited for s in sequences], pa.bool_()),
            "byte_start": pa.array([s.byte_start for s in sequences], pa.int64()),
            "input_ids": pa.array([s.input_ids_N for s in sequences], pa.list_(pa.int32())),
            "loss_mask": pa.array([s.loss_mask_N for s in sequences], pa.list_(pa.int32())),
            "byte_end": pa.array([s.byte_end_N for s in sequences], pa.list_(pa.int32())),
        }
    )


def position_table(rows: list[ScoredSequence], spec: ShardSpec) -> pa.Table:
    """Build a table with one row per position, in the order of the sequences."""
    lengths = [len(row.signals.label_logprob_T) for row in rows]
    kept = [row.signals.entry_logweight_TK > -np.inf for row in rows]
    counts = _concat([kept_TK.sum(axis=1) for kept_TK in kept], np.int32)
    ids = [row.signals.entry_id_TK[kept_TK] for row, kept_TK in zip(rows, kept, strict=True)]
    weights = [row.signals.entry_logweight_TK[kept_TK] for row, kept_TK in zip(rows, kept, strict=True)]
    columns = {
        "sequence_id": pa.array(np.repeat([row.sequence.sequence_id for row in rows], lengths).tolist(), pa.string()),
        "position": pa.array(_concat([np.arange(n) for n in lengths], np.int32)),
        "token_id": pa.array(_concat([row.sequence.input_ids_N[:-1] for row in rows], np.int32)),
        "label_id": pa.array(_concat([row.sequence.input_ids_N[1:] for row in rows], np.int32)),
        "is_label": pa.array(_concat([row.sequence.loss_mask_N[1:] for row in rows], np.uint8).astype(bool)),
        "label_logprob": _floats([row.signals.label_logprob_T for row in rows]),
        "entropy": _floats([row.signals.entropy_T for row in rows]),
        "tail_logmass": _floats([row.signals.tail_logmass_T for row in rows]),
        "entry_id": _lists(_concat(ids, np.int32), counts),
        "entry_logweight": _lists(_concat(weights, np.float32), counts),
    }
    return pa.table({**columns, **dict(_optional_columns(rows, spec))})


def _optional_columns(rows: list[ScoredSequence], spec: ShardSpec) -> Iterator[tuple[str, pa.Array]]:
    signals = [row.signals for row in rows]
    yield "log_partition", _matrix([s.log_partition_TC for s in signals], len(spec.capture.temperatures))
    if spec.capture.any_temperature:
        yield "tail_shape", _matrix([s.tail_shape_T3 for s in signals if s.tail_shape_T3 is not None], 3)
    if spec.capture.boundary:
        parts = [s.boundary_logmass_T for s in signals if s.boundary_logmass_T is not None]
        yield "boundary_logmass", _floats(parts)
    for number, layer in enumerate(spec.hidden):
        states = [to_float32(s.hidden_TLD[:, number]) for s in signals if s.hidden_TLD is not None]
        yield layer.column, _matrix(states, spec.hidden_width)


def _concat(parts: list[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    values: NDArray[Any] = np.concatenate([*parts, np.zeros(0, dtype)]).astype(dtype)
    return values


def _floats(parts: list[NDArray[np.float32]]) -> pa.Array:
    return pa.array(_concat(parts, np.float32))


def _matrix(parts: list[NDArray[np.float32]], width: int) -> pa.Array:
    """Build a list column with `width` values per position."""
    values = np.concatenate([*parts, np.zeros((0, width), np.float32)])
    return _lists(values.ravel(), np.full(len(values), width, np.int32))


def _lists(values: NDArray[Any], counts: NDArray[np.int32]) -> pa.Array:
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), pa.array(values))
