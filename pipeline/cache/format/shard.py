"""A committed shard in memory: verified against its commit, then read by row group."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.commit import Commit, row_set_digest
from pipeline.cache.format.codecs import decode_sequence, decode_signals
from pipeline.cache.format.parquet import ShardDamage, column_bytes, open_parquet, read_row_group, to_rows
from pipeline.cache.format.schema import ShardSpec
from pipeline.cache.storage.store import Store
from pipeline.contracts import IntArray, ScoredSequence
from pipeline.errors import DamageError, UsageError
from pipeline.identity import sha256_bytes, token_digest


@dataclass(frozen=True)
class Shard:
    """An open shard. Methods raise ShardDamage, with file, row group and row, if stored values cannot be decoded."""

    name: str
    file: pq.ParquetFile
    spec: ShardSpec
    verify: bool

    @property
    def row_groups(self) -> int:
        """Return the number of row groups."""
        return int(self.file.num_row_groups)

    @cached_property
    def first_row(self) -> list[int]:
        """Index in the shard of each row group's first row."""
        counts = [self.file.metadata.row_group(number).num_rows for number in range(self.row_groups)]
        return [0, *np.cumsum(counts, dtype=int).tolist()][: self.row_groups]

    def table(self, row_group: int) -> pa.Table:
        """Return a row group as stored, tensors not decoded. Raises UsageError if the index is out of range."""
        if not 0 <= row_group < self.row_groups:
            raise UsageError(f"shard {self.name}: expected a row group of 0..{self.row_groups - 1}, got {row_group}")
        return read_row_group(self.file, row_group, self.name)

    def rows(self, row_group: int) -> Iterator[ScoredSequence]:
        """Yield the decoded rows of a row group."""
        table, first = self.table(row_group), self.first_row[row_group]
        for number, row in enumerate(to_rows(table)):
            try:
                yield _decode(row, self.spec, self.verify)
            except (ValueError, TypeError) as error:
                raise ShardDamage(self.name, " ".join(str(error).split()), row_group, first + number) from error

    def column_bytes(self) -> dict[str, int]:
        """Return the compressed bytes of each column."""
        return column_bytes(self.file.metadata)

    def lengths(self) -> IntArray:
        """Return the number of tokens of each row."""
        return np.array(self._column("n_tokens"), np.int32)

    def sequence_ids(self) -> list[str]:
        """Return the sequence id of each row."""
        return self._column("sequence_id")

    def _column(self, name: str) -> list[Any]:
        tables = (read_row_group(self.file, number, self.name, [name]) for number in range(self.row_groups))
        return [value for table in tables for value in table.column(name).to_pylist()]


def open_shard(store: Store, commit: Commit, fingerprint: str, *, verify: bool = True) -> Shard:
    """Read and open a commit's shard.

    `verify` compares fingerprint, sha256 and row set with the commit, and each row's `input_ids` with their digest.
    Page checksums are always verified. Raises StorageError if the file is missing, ShardDamage if it is wrong.
    """
    name = store.where(commit.file)
    data = store.read(commit.file)
    if verify:
        _check_bytes(data, commit, name)
        if commit.fingerprint != fingerprint:
            raise ShardDamage(name, f"expected a shard of cache {fingerprint}, got one of cache {commit.fingerprint}")
    file = open_parquet(data, name)
    shard = Shard(name, file, _spec_of(file, name), verify)
    if verify:
        _check_rows(shard, commit)
    return shard


def _check_bytes(data: bytes, commit: Commit, name: str) -> None:
    if len(data) != commit.bytes:
        raise ShardDamage(name, f"expected {commit.bytes} bytes, got {len(data)}")
    sha256 = sha256_bytes(data)
    if sha256 != commit.sha256:
        raise ShardDamage(name, f"expected sha256 {commit.sha256}, got {sha256}")


def _check_rows(shard: Shard, commit: Commit) -> None:
    ids = shard.sequence_ids()
    got, expected = (len(ids), row_set_digest(ids)), (commit.rows, commit.sequences_sha256)
    if got != expected:
        raise ShardDamage(shard.name, f"expected rows and digest of its commit {expected}, got {got}")


def _spec_of(file: pq.ParquetFile, name: str) -> ShardSpec:
    try:
        return _parse_spec(file.schema_arrow.serialize().to_pybytes())
    except DamageError as error:
        raise ShardDamage(name, str(error)) from error


@lru_cache(maxsize=16)
def _parse_spec(schema: bytes) -> ShardSpec:
    """Parse a schema; cached, since a cache's shards share one and parsing takes longer than hashing a small shard."""
    return ShardSpec.from_schema(pa.ipc.read_schema(pa.BufferReader(schema)))


def _decode(row: dict[str, Any], spec: ShardSpec, verify: bool) -> ScoredSequence:
    sequence = decode_sequence(row)
    if verify and (digest := token_digest(sequence.input_ids_N)) != row["input_digest"]:
        raise ValueError(f"input_ids of {sequence.sequence_id}: expected digest {row['input_digest']}, got {digest}")
    return ScoredSequence(sequence, decode_signals(row, len(sequence.input_ids_N), spec))
