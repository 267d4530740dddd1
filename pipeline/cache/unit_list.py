"""The unit list: all token sequences that a teacher reads, grouped into units, as Parquet.

`units/NNNNN.parquet` holds up to 512 units, one row group each. `units/index.parquet` is written last: the file and row
group of each unit, the lengths of its sequences, and the sha256 of every file. Writing and reading hold one file in
memory; the index grows in temporary files.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.commit import row_set_digest
from pipeline.cache.format.codecs import decode_sequence, encode_sequence
from pipeline.cache.format.parquet import ShardDamage, open_parquet, read_row_group, to_parquet, to_rows
from pipeline.cache.format.schema import PLAIN_COLUMNS
from pipeline.cache.storage import layout
from pipeline.cache.storage.store import Store
from pipeline.contracts import IntArray, Split, Unit
from pipeline.errors import DamageError, StorageError
from pipeline.identity import sha256_bytes

UNITS_PER_FILE = 512
TOKENS_PER_FILE = 4_000_000
"""A file is closed at the first of both limits: about 40 MB before compression."""

_FILES_KEY = b"stillhouse.files"
_SCHEMA = pa.schema([("unit_id", pa.string()), *PLAIN_COLUMNS, ("loss_mask", pa.binary()), ("byte_end", pa.binary())])
_INDEX_SCHEMA = pa.schema(
    [
        ("unit_id", pa.string()),
        ("file", pa.int32()),
        ("row_group", pa.int32()),
        ("n_tokens", pa.list_(pa.int32())),
        ("n_labels", pa.list_(pa.int32())),
        ("sequences_sha256", pa.string()),
    ]
)


@dataclass
class UnitWriter:
    """Writes units in the order of `add`. A list without `finish` is invalid, and the next writer overwrites it."""

    store: Store
    _pending: list[Unit] = field(default_factory=list)
    _pending_tokens: int = 0
    _index: dict[Split, "_Spool"] = field(default_factory=lambda: {"train": _Spool(), "held_out": _Spool()})
    _files: list[str] = field(default_factory=list)

    def add(self, unit: Unit) -> None:
        """Append a unit. Raises StorageError where its id is invalid or of another split."""
        if layout.split_of(unit.unit_id) != unit.split:
            raise StorageError(f"unit {unit.unit_id}: expected the id of a {unit.split} unit")
        self._pending.append(unit)
        self._pending_tokens += sum(len(sequence.input_ids_N) for sequence in unit.sequences)
        if len(self._pending) == UNITS_PER_FILE or self._pending_tokens >= TOKENS_PER_FILE:
            self._flush()

    def finish(self) -> None:
        """Write the remaining units and the index."""
        self._flush()
        schema = _INDEX_SCHEMA.with_metadata({_FILES_KEY: json.dumps(self._files).encode()})
        tables = (table for split in ("train", "held_out") for table in self._index[split].tables())
        self.store.put(layout.UNIT_INDEX, to_parquet(tables, schema))

    def _flush(self) -> None:
        if self._pending:
            entries = [_index_entry(unit, len(self._files), group) for group, unit in enumerate(self._pending)]
            for split, spool in self._index.items():
                spool.add([entry for entry in entries if layout.split_of(entry["unit_id"]) == split])
            data = to_parquet((_unit_table(unit) for unit in self._pending), _SCHEMA)
            self.store.put(layout.unit_file_path(len(self._files)), data)
            self._files.append(sha256_bytes(data))
            self._pending, self._pending_tokens = [], 0


class _Spool:
    """The index entries of one split, in a temporary file in Arrow's stream format."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed and deleted with the spool
        self._writer = pa.ipc.new_stream(self._file, _INDEX_SCHEMA)

    def add(self, entries: list[dict[str, Any]]) -> None:
        if entries:
            self._writer.write_table(pa.Table.from_pylist(entries, schema=_INDEX_SCHEMA))

    def tables(self) -> Iterator[pa.Table]:
        self._writer.close()
        self._file.seek(0)
        for batch in pa.ipc.open_stream(self._file):
            yield pa.Table.from_batches([batch])


def write_units(store: Store, units: Iterable[Unit]) -> None:
    """Write a complete list. Memory does not grow with the number of units."""
    writer = UnitWriter(store)
    for unit in units:
        writer.add(unit)
    writer.finish()


@dataclass(frozen=True)
class UnitList:
    """The units of a cache, training first, each split by number. Opening reads the index alone."""

    store: Store
    _index: pa.Table
    _files: tuple[str, ...]
    _last_file: dict[int, pq.ParquetFile] = field(default_factory=dict, compare=False)

    @classmethod
    def open(cls, store: Store) -> "UnitList":
        """Open the list. Raises StorageError where no list was finished, DamageError where it is invalid."""
        data = store.read_if_present(layout.UNIT_INDEX)
        if data is None:
            raise StorageError(f"{store.uri}: expected a prepared cache, found no {layout.UNIT_INDEX}")
        where = store.where(layout.UNIT_INDEX)
        file = open_parquet(data, where)
        groups = [read_row_group(file, group, where) for group in range(file.num_row_groups)]
        index = pa.concat_tables(groups).combine_chunks() if groups else file.schema_arrow.empty_table()
        metadata = index.schema.metadata or {}
        if _FILES_KEY not in metadata or not index.schema.equals(_INDEX_SCHEMA):
            raise ShardDamage(where, f"expected the columns of a unit list, got {index.schema.names}")
        return cls(store, index, tuple(json.loads(metadata[_FILES_KEY])))

    def __reduce__(self) -> "tuple[Callable[[Store], UnitList], tuple[Store]]":
        """Reopen the list in another process, since an open Parquet file cannot be pickled."""
        return UnitList.open, (self.store,)

    def __len__(self) -> int:
        """Return the number of units in both splits."""
        return int(self._index.num_rows)

    def __contains__(self, unit_id: object) -> bool:
        """Return whether the list has a unit of that id."""
        return unit_id in self._row_of

    def unit_ids(self, split: Split | None = None) -> list[str]:
        """List the ids of a split's units, or of both, in order."""
        return [unit_id for unit_id in self._row_of if split is None or layout.split_of(unit_id) == split]

    def n_tokens(self, unit_id: str) -> IntArray:
        """Return the tokens of each of the unit's sequences, from the index."""
        return self._lengths("n_tokens", unit_id)

    def n_labels(self, unit_id: str) -> IntArray:
        """Return the labels (tokens with loss mask 1) of each of the unit's sequences, from the index."""
        return self._lengths("n_labels", unit_id)

    def sequences_sha256(self, unit_id: str) -> str:
        """Return the `row_set_digest` of the unit's sequence ids, from the index."""
        return str(self._index.column("sequences_sha256")[self._row(unit_id)].as_py())

    def tokens(self, split: Split | None = None) -> int:
        """Count the tokens of a split, or of both."""
        return sum(int(self.n_tokens(unit_id).sum()) for unit_id in self.unit_ids(split))

    def paths(self) -> list[str]:
        """List the paths of the index and of all files."""
        return [layout.UNIT_INDEX, *map(layout.unit_file_path, range(len(self._files)))]

    def domains(self, split: Split) -> set[str | None]:
        """Collect the domains of a split's documents: reads two columns of every file. Raises DamageError."""
        import pyarrow.compute as pc

        domains: set[str | None] = set()
        for number in range(len(self._files)):
            file = self._file(number, self.store.where(layout.unit_file_path(number)))
            table = file.read(columns=["split", "domain"])
            domains |= set(table.filter(pc.field("split") == split).column("domain").to_pylist())
        return domains

    def read(self, unit_id: str) -> Unit:
        """Read a unit. Its file stays in memory until a unit of another file is read.

        Raises DamageError where the file or the unit in it is damaged.
        """
        row = self._row(unit_id)
        number, group = (int(self._index.column(name)[row].as_py()) for name in ("file", "row_group"))
        where = self.store.where(layout.unit_file_path(number))
        rows = list(to_rows(read_row_group(self._file(number, where), group, where)))
        sequences = tuple(decode_sequence(row) for row in rows)
        ids = [sequence.sequence_id for sequence in sequences]
        if row_set_digest(ids) != self.sequences_sha256(unit_id) or any(row["unit_id"] != unit_id for row in rows):
            raise ShardDamage(where, f"expected the sequences of {unit_id}", group)
        return Unit(unit_id, layout.split_of(unit_id), sequences)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {unit_id: row for row, unit_id in enumerate(self._index.column("unit_id").to_pylist())}

    def _row(self, unit_id: str) -> int:
        if unit_id not in self._row_of:
            raise DamageError(f"unit list of {self.store.uri}: expected unit {unit_id!r}, found none")
        return self._row_of[unit_id]

    def _lengths(self, column: str, unit_id: str) -> IntArray:
        return np.asarray(self._index.column(column)[self._row(unit_id)].values, np.int32)

    def _file(self, number: int, where: str) -> pq.ParquetFile:
        last = self._last_file.get(number)
        if last is not None:
            return last
        data = self.store.read(layout.unit_file_path(number))
        if sha256_bytes(data) != self._files[number]:
            raise ShardDamage(where, f"expected sha256 {self._files[number]}, got {sha256_bytes(data)}")
        self._last_file.clear()
        return self._last_file.setdefault(number, open_parquet(data, where))


def _index_entry(unit: Unit, file: int, row_group: int) -> dict[str, Any]:
    return {
        "unit_id": unit.unit_id,
        "file": file,
        "row_group": row_group,
        "n_tokens": [len(sequence.input_ids_N) for sequence in unit.sequences],
        "n_labels": [int(np.count_nonzero(sequence.loss_mask_N[1:])) for sequence in unit.sequences],
        "sequences_sha256": row_set_digest(sequence.sequence_id for sequence in unit.sequences),
    }


def _unit_table(unit: Unit) -> pa.Table:
    rows = [{"unit_id": unit.unit_id, **encode_sequence(sequence)} for sequence in unit.sequences]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)
