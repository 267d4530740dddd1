"""The reader of a cache: decoded rows, Arrow tables, pandas or torch, one shard in memory at a time."""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.cache import lm_head
from pipeline.cache.commit import Commit, read_commit
from pipeline.cache.description import CacheIdentity, read_identity, read_teacher
from pipeline.cache.export import frames, tables
from pipeline.cache.format.schema import ShardSpec, arrow_schema
from pipeline.cache.format.shard import Shard, open_shard
from pipeline.cache.manifest import Manifest, derive_manifest, read_manifest
from pipeline.cache.storage import layout
from pipeline.cache.storage.store import Store
from pipeline.cache.unit_list import UnitList
from pipeline.contracts import IntArray, LmHead, ScoredSequence, Split, TeacherDescription
from pipeline.errors import StorageError


@dataclass(frozen=True)
class CacheReader:
    """A snapshot of a cache: the units of its manifest, or of its commits where there is no manifest yet.

    With `verify`, every shard is checked against its commit and every row's `input_ids` against their digest.
    """

    store: Store
    identity: CacheIdentity
    manifest: Manifest
    verify: bool = True
    _copies: list[tempfile.TemporaryDirectory[str]] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def open(cls, uri: str | Path | Store, verify: bool = True) -> "CacheReader":
        """Open the cache at a URI. Raises StorageError where there is none, DamageError where a record is invalid."""
        store = Store.open(uri)
        return cls(store, read_identity(store), read_manifest(store) or derive_manifest(store), verify)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the snapshot: another process reads the same units."""
        return CacheReader, (self.store, self.identity, self.manifest, self.verify)

    @cached_property
    def description(self) -> TeacherDescription:
        """The teacher. Raises StorageError before any engine has started."""
        return self._teacher[0]

    @cached_property
    def spec(self) -> ShardSpec:
        """The columns and codecs of the shards. Raises StorageError before any engine has started."""
        return self._teacher[1]

    @cached_property
    def units(self) -> UnitList:
        """The unit list that the cache was prepared with."""
        return UnitList.open(self.store)

    def unit_ids(self, split: Split | None = None) -> list[str]:
        """List the committed units of a split, or of both: training first, each split by number."""
        splits: tuple[Split, ...] = ("train", "held_out") if split is None else (split,)
        return [unit_id for name in splits for unit_id in self.manifest.unit_ids(name)]

    def lengths(self, unit_id: str) -> IntArray:
        """Return the tokens of each row of a committed unit. Reads its shard only where rows are quarantined."""
        commit = self.commit(unit_id)
        if commit.sequences_sha256 == self.units.sequences_sha256(unit_id):
            return self.units.n_tokens(unit_id)
        return self.shard(unit_id).lengths()

    def read_unit(self, unit_id: str) -> list[ScoredSequence]:
        """Decode all rows of a committed unit. Raises ShardDamage."""
        return list(self.unit_rows(unit_id))

    def unit_rows(self, unit_id: str, row_groups: Iterable[int] | None = None) -> Iterator[ScoredSequence]:
        """Decode the rows of a committed unit one by one, from all or from some row groups."""
        shard = self.shard(unit_id)
        for number in range(shard.row_groups) if row_groups is None else row_groups:
            yield from shard.rows(number)

    def rows(self, split: Split | None = None) -> Iterator[ScoredSequence]:
        """Decode all rows of a split, or of both, in the order of the unit list."""
        for unit_id in self.unit_ids(split):
            yield from self.unit_rows(unit_id)

    def batches(self, unit_ids: Iterable[str], row_groups: Iterable[int] | None = None) -> Iterator[pa.RecordBatch]:
        """Read the stored, encoded columns of some units (and row groups of each), a row group at a time."""
        selected = None if row_groups is None else list(row_groups)
        for unit_id in unit_ids:
            shard = self.shard(unit_id)
            for number in range(shard.row_groups) if selected is None else selected:
                yield from shard.table(number).combine_chunks().to_batches()

    def to_arrow(self, unit_ids: Iterable[str], row_groups: Iterable[int] | None = None) -> pa.Table:
        """Read `batches` into one table, which holds all of them in memory."""
        return pa.Table.from_batches(self.batches(unit_ids, row_groups), arrow_schema(self.spec))

    def positions(self, unit_ids: Iterable[str], row_groups: Iterable[int] | None = None) -> Iterator[pa.RecordBatch]:
        """Decode rows as Arrow: a batch per sequence with one row per position (`tables.position_table`)."""
        for row in self._selected_rows(unit_ids, row_groups):
            yield from tables.position_table([row], self.spec).combine_chunks().to_batches()

    def to_pandas(self, unit_ids: Iterable[str], row_groups: Iterable[int] | None = None) -> Any:
        """Decode rows into a DataFrame (`frames.to_frame`)."""
        return frames.to_frame(self._selected_rows(unit_ids, row_groups))

    def tensors(self, unit_ids: Iterable[str], row_groups: Iterable[int] | None = None) -> Iterator[dict[str, Any]]:
        """Decode rows as torch tensors, one by one (`frames.to_tensors`)."""
        return map(frames.to_tensors, self._selected_rows(unit_ids, row_groups))

    def shard(self, unit_id: str) -> Shard:
        """Open a committed unit's shard, checked against its commit with `verify`."""
        return open_shard(self.store, self.commit(unit_id), self.identity.fingerprint, verify=self.verify)

    def commit(self, unit_id: str) -> Commit:
        """Return a unit's commit, also one newer than the manifest. Raises StorageError where there is none."""
        commit = self.manifest.by_unit.get(unit_id) or read_commit(self.store, unit_id)
        if commit is None:
            raise StorageError(f"cache {self.store.uri}: unit {unit_id} is not committed; run: stillhouse capture")
        return commit

    def lm_head(self) -> LmHead | None:
        """Read the teacher's LM head; None where its engine exports none. Raises DamageError."""
        return lm_head.read_lm_head(self.store)

    def tokenizer_dir(self) -> Path:
        """Return a local folder with the teacher's tokenizer files.

        A temporary copy where the cache is remote, deleted with this reader. Raises StorageError where there are none.
        """
        names = self.store.list(layout.TOKENIZER)
        if not names:
            raise StorageError(f"cache {self.store.uri}: expected tokenizer files in {layout.TOKENIZER}/, got none")
        local = self.store.local_path()
        return local / layout.TOKENIZER if local is not None else self._copy_tokenizer(names)

    def _selected_rows(self, unit_ids: Iterable[str], row_groups: Iterable[int] | None) -> Iterator[ScoredSequence]:
        selected = None if row_groups is None else list(row_groups)
        return (row for unit_id in unit_ids for row in self.unit_rows(unit_id, selected))

    @cached_property
    def _teacher(self) -> tuple[TeacherDescription, ShardSpec]:
        teacher = read_teacher(self.store)
        if teacher is None:
            raise StorageError(f"cache {self.store.uri}: no engine has started yet; run: stillhouse capture")
        return teacher

    def _copy_tokenizer(self, names: list[str]) -> Path:
        if not self._copies:
            self._copies.append(tempfile.TemporaryDirectory(prefix="stillhouse-"))
            for name, data in zip(names, self.store.read_many(names), strict=True):
                target = Path(self._copies[0].name, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
        return Path(self._copies[0].name, layout.TOKENIZER)
