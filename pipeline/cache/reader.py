"""The way into a cache for everyone who reads one: rows, Arrow, pandas, a shard at a time."""

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
    """A cache as its manifest, or while that is not written its commits, say it is. Holds one shard at a time.

    With `verify` every shard that is read is first held against its commit, and every row's `input_ids` against
    their digest.
    """

    store: Store
    identity: CacheIdentity
    manifest: Manifest
    verify: bool = True
    _copies: list[tempfile.TemporaryDirectory[str]] = field(default_factory=list, repr=False, compare=False)

    @classmethod
    def open(cls, uri: str | Path | Store, verify: bool = True) -> "CacheReader":
        """The cache at a URI. Raises StorageError where there is none, DamageError where its records are damaged."""
        store = Store.open(uri)
        return cls(store, read_identity(store), read_manifest(store) or derive_manifest(store), verify)

    def __reduce__(self) -> tuple[Any, ...]:
        """The same view of the cache in another process."""
        return CacheReader, (self.store, self.identity, self.manifest, self.verify)

    @cached_property
    def description(self) -> TeacherDescription:
        """The teacher. Raises StorageError before any engine has opened."""
        return self._teacher[0]

    @cached_property
    def spec(self) -> ShardSpec:
        """What the shards hold. Raises StorageError before any engine has opened."""
        return self._teacher[1]

    @cached_property
    def units(self) -> UnitList:
        """The plan that the shards answer."""
        return UnitList.open(self.store)

    def unit_ids(self, split: Split | None = None) -> list[str]:
        """The committed units of a split, or of both, in order."""
        splits: tuple[Split, ...] = ("train", "held_out") if split is None else (split,)
        return [unit_id for name in splits for unit_id in self.manifest.unit_ids(name)]

    def lengths(self, unit_id: str) -> IntArray:
        """Tokens of each row of a committed unit; its shard is read only where rows are missing from it."""
        commit = self.commit(unit_id)
        if commit.sequences_sha256 == self.units.sequences_sha256(unit_id):
            return self.units.n_tokens(unit_id)
        return self.shard(unit_id).lengths()

    def read_unit(self, unit_id: str) -> list[ScoredSequence]:
        """All rows of a committed unit. Raises ShardDamage."""
        return list(self.unit_rows(unit_id))

    def unit_rows(self, unit_id: str, row_groups: Iterable[int] | None = None) -> Iterator[ScoredSequence]:
        """Rows of a committed unit, of all or of some row groups, decoded one by one."""
        shard = self.shard(unit_id)
        for number in range(shard.row_groups) if row_groups is None else row_groups:
            yield from shard.rows(number)

    def rows(self, split: Split | None = None) -> Iterator[ScoredSequence]:
        """All rows of a split, or of both, in the plan's order."""
        for unit_id in self.unit_ids(split):
            yield from self.unit_rows(unit_id)

    def batches(self, unit_ids: Iterable[str], row_groups: Iterable[int] | None = None) -> Iterator[pa.RecordBatch]:
        """The stored columns of some units (and row groups of each), a row group at a time."""
        chosen = None if row_groups is None else list(row_groups)
        for unit_id in unit_ids:
            shard = self.shard(unit_id)
            for number in range(shard.row_groups) if chosen is None else chosen:
                yield from shard.table(number).combine_chunks().to_batches()

    def to_arrow(self, unit_ids: Iterable[str], row_groups: Iterable[int] | None = None) -> pa.Table:
        """`batches` as one table: as much memory as what is asked for."""
        return pa.Table.from_batches(self.batches(unit_ids, row_groups), arrow_schema(self.spec))

    def positions(self, unit_ids: Iterable[str], row_groups: Iterable[int] | None = None) -> Iterator[pa.RecordBatch]:
        """The decoded rows as Arrow: a batch a sequence, in it one row a position, as `tables.position_table` says."""
        for row in self._chosen(unit_ids, row_groups):
            yield from tables.position_table([row], self.spec).combine_chunks().to_batches()

    def to_pandas(self, unit_ids: Iterable[str], row_groups: Iterable[int] | None = None) -> Any:
        """A DataFrame of the decoded rows: `frames.to_frame`."""
        return frames.to_frame(self._chosen(unit_ids, row_groups))

    def tensors(self, unit_ids: Iterable[str], row_groups: Iterable[int] | None = None) -> Iterator[dict[str, Any]]:
        """The decoded rows as torch tensors, one by one: `frames.to_tensors`."""
        return map(frames.to_tensors, self._chosen(unit_ids, row_groups))

    def shard(self, unit_id: str) -> Shard:
        """A committed unit's shard, checked."""
        return open_shard(self.store, self.commit(unit_id), self.identity.fingerprint, verify=self.verify)

    def commit(self, unit_id: str) -> Commit:
        """A unit's commit, also if it is newer than the manifest. Raises StorageError where there is none."""
        commit = self.manifest.by_unit.get(unit_id) or read_commit(self.store, unit_id)
        if commit is None:
            raise StorageError(f"cache {self.store.uri}: unit {unit_id} is not committed; run: stillhouse capture")
        return commit

    def lm_head(self) -> LmHead | None:
        """The teacher's LM head, or None where its engine gave none. Raises DamageError."""
        return lm_head.read_lm_head(self.store)

    def tokenizer_dir(self) -> Path:
        """A local folder with the teacher's tokenizer files: the cache's own, or a copy that lives as long as this."""
        names = self.store.list(layout.TOKENIZER)
        if not names:
            raise StorageError(f"cache {self.store.uri}: expected tokenizer files in {layout.TOKENIZER}/, got none")
        local = self.store.local_path()
        return local / layout.TOKENIZER if local is not None else self._copy(names)

    def _chosen(self, unit_ids: Iterable[str], row_groups: Iterable[int] | None) -> Iterator[ScoredSequence]:
        chosen = None if row_groups is None else list(row_groups)
        return (row for unit_id in unit_ids for row in self.unit_rows(unit_id, chosen))

    @cached_property
    def _teacher(self) -> tuple[TeacherDescription, ShardSpec]:
        found = read_teacher(self.store)
        if found is None:
            raise StorageError(f"cache {self.store.uri}: no teacher has opened yet; run: stillhouse capture")
        return found

    def _copy(self, names: list[str]) -> Path:
        if not self._copies:
            self._copies.append(tempfile.TemporaryDirectory(prefix="stillhouse-"))
            for name, data in zip(names, self.store.read_many(names), strict=True):
                target = Path(self._copies[0].name, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
        return Path(self._copies[0].name, layout.TOKENIZER)
