"""A cache in an open layout: plain Parquet that pandas, DuckDB, Polars and Hugging Face `datasets` read by themselves.

sequences/<unit>.parquet   one row a sequence: names, `input_ids`, `loss_mask` and `byte_end` as lists
positions/<unit>.parquet   one row a position: label, scalars, `entry_id` and `entry_logweight` as lists
README.md                  what the columns mean, written last
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.cache.audit_targets import float32
from pipeline.cache.parquet import to_parquet
from pipeline.cache.reader import CacheReader
from pipeline.cache.schema import ShardSpec
from pipeline.cache.storage import Store
from pipeline.contracts import ScoredSequence
from pipeline.errors import UsageError

README = "README.md"
_TABLES = ("sequences", "positions")


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    folder: str
    sequences: int
    positions: int
    files: int
    bytes: int

    def as_json(self) -> dict[str, Any]:
        """The counts as JSON holds them."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"wrote {self.sequences} sequences, {self.positions} positions in {self.files} Parquet files, "
            f"{self.bytes / 1e6:.1f} MB: {self.folder}\n"
            f"  {self.folder.rstrip('/')}/{README} says what the columns mean; for example, with DuckDB:\n"
            f"  SELECT label_id, label_logprob, entry_id FROM '{self.folder.rstrip('/')}/positions/*.parquet' LIMIT 5"
        )


def export_cache(uri: str | Path | Store, folder: str | Path | Store) -> Exported:
    """Write every committed row into `folder`, which may be any URI; holds one unit at a time.

    Raises UsageError where other files lie there already, StorageError, DamageError.
    """
    reader, target = CacheReader.open(uri), Store.open(folder)
    _refuse_others(reader, target)
    sequences = positions = files = size = 0
    for unit_id in reader.unit_ids():
        rows = reader.read_unit(unit_id)
        for name, table in zip(_TABLES, (sequence_table(rows), position_table(rows, reader.spec)), strict=True):
            data = to_parquet([table], table.schema)
            target.put(f"{name}/{unit_id}.parquet", data)
            files, size = files + 1, size + len(data)
        sequences, positions = sequences + len(rows), positions + sum(_lengths(rows))
    target.put(README, _readme(reader).encode())
    return Exported(target.uri, sequences, positions, files, size)


def sequence_table(rows: list[ScoredSequence]) -> pa.Table:
    """One row a sequence."""
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
    """One row a position, in the order of the sequences."""
    lengths = _lengths(rows)
    kept = [row.signals.entry_logweight_TK > -np.inf for row in rows]
    counts = _joined([kept_TK.sum(axis=1) for kept_TK in kept], np.int32)
    ids = [row.signals.entry_id_TK[kept_TK] for row, kept_TK in zip(rows, kept, strict=True)]
    weights = [row.signals.entry_logweight_TK[kept_TK] for row, kept_TK in zip(rows, kept, strict=True)]
    columns = {
        "sequence_id": pa.array(np.repeat([row.sequence.sequence_id for row in rows], lengths).tolist(), pa.string()),
        "position": pa.array(_joined([np.arange(n) for n in lengths], np.int32)),
        "token_id": pa.array(_joined([row.sequence.input_ids_N[:-1] for row in rows], np.int32)),
        "label_id": pa.array(_joined([row.sequence.input_ids_N[1:] for row in rows], np.int32)),
        "is_label": pa.array(_joined([row.sequence.loss_mask_N[1:] for row in rows], np.uint8).astype(bool)),
        "label_logprob": _floats([row.signals.label_logprob_T for row in rows]),
        "entropy": _floats([row.signals.entropy_T for row in rows]),
        "tail_logmass": _floats([row.signals.tail_logmass_T for row in rows]),
        "entry_id": _lists(_joined(ids, np.int32), counts),
        "entry_logweight": _lists(_joined(weights, np.float32), counts),
    }
    return pa.table({**columns, **dict(_optional(rows, spec))})


def _optional(rows: list[ScoredSequence], spec: ShardSpec) -> Iterator[tuple[str, pa.Array]]:
    signals = [row.signals for row in rows]
    yield "log_partition", _matrix([s.log_partition_TC for s in signals], len(spec.capture.temperatures))
    if spec.capture.any_temperature:
        yield "tail_shape", _matrix([s.tail_shape_T3 for s in signals if s.tail_shape_T3 is not None], 3)
    if spec.capture.boundary:
        yield "boundary_logmass", _floats([s.boundary_logmass_T for s in signals if s.boundary_logmass_T is not None])
    for number, layer in enumerate(spec.hidden):
        states = [float32(s.hidden_TLD[:, number]) for s in signals if s.hidden_TLD is not None]
        yield layer.column, _matrix(states, spec.hidden_width)


def _lengths(rows: list[ScoredSequence]) -> list[int]:
    return [len(row.signals.label_logprob_T) for row in rows]


def _joined(parts: list[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    joined: NDArray[Any] = np.concatenate([*parts, np.zeros(0, dtype)]).astype(dtype)
    return joined


def _floats(parts: list[NDArray[np.float32]]) -> pa.Array:
    return pa.array(_joined(parts, np.float32))


def _matrix(parts: list[NDArray[np.float32]], width: int) -> pa.Array:
    """One list of `width` values a position."""
    values = np.concatenate([*parts, np.zeros((0, width), np.float32)])
    return _lists(values.ravel(), np.full(len(values), width, np.int32))


def _lists(values: NDArray[Any], counts: NDArray[np.int32]) -> pa.Array:
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), pa.array(values))


def _refuse_others(reader: CacheReader, target: Store) -> None:
    ours = {README, *(f"{table}/{unit_id}.parquet" for table in _TABLES for unit_id in reader.unit_ids())}
    others = [path for path in target.list() if path not in ours]
    if others:
        raise UsageError(f"export to {target.uri}: expected an empty folder, got {others[0]} and perhaps more")


def _readme(reader: CacheReader) -> str:
    """With front matter that tells `datasets` which files belong together."""
    capture = reader.spec.capture
    configs = "".join(
        f"- config_name: {table}\n  data_files:\n"
        + "".join(f"  - {{split: {split}, path: {table}/{split}-*.parquet}}\n" for split in _present_splits(reader))
        for table in _TABLES
    )
    return f"""---
configs:
{configs}---

# What {reader.description.name} said

Exported from a stillhouse cache with fingerprint `{reader.identity.fingerprint}`: target mode `{capture.mode}`,
k={capture.k}, V={reader.spec.vocabulary}.

`sequences` has one row a sequence. `loss_mask` is 1 where a token counts as a label, `byte_end` is where each token
ends in the document's UTF-8 bytes.

`positions` has one row a position: the teacher's view of `label_id` given the tokens up to `token_id`. Logarithms are
natural, at temperature 1.

| column | meaning |
|---|---|
| `label_logprob`, `entropy` | of the label, and of the whole distribution |
| `entry_id`, `entry_logweight` | kept entries by falling weight: probabilities in `topk` and `topp`, else shares |
| `tail_logmass` | log of the probability that the entries leave out; -inf where their weights sum to 1 |
| `log_partition` | log sum of p^(1/T) at T = {", ".join(f"{t:g}" for t in capture.temperatures)} |
| `hidden_*` | states of the teacher after that many layers; `normed`: after the final norm |
"""


def _present_splits(reader: CacheReader) -> list[str]:
    return [split for split in ("train", "held_out") if any(u.startswith(f"{split}-") for u in reader.unit_ids())]
