"""One committed shard, held against everything that is known of it: commit, plan, spec, arithmetic, second reader."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.commit import Commit, make_commit
from pipeline.cache.format.codecs import decode_sequence, decode_signals
from pipeline.cache.format.parquet import ShardDamage, open_parquet, read_row_group, to_rows
from pipeline.cache.format.schema import ShardSpec
from pipeline.cache.verify import cross_reader_check
from pipeline.cache.verify.findings import Finding
from pipeline.cache.verify.row_checks import differences, impossible_mass, impossible_signals
from pipeline.contracts import TokenSequence
from pipeline.errors import DamageError
from pipeline.identity import differing_fields, sha256_bytes, token_digest

_UNDECODABLE = (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeDecodeError)


@dataclass
class ShardCheck:
    """Checks one shard's bytes. `findings()` may be called once."""

    commit: Commit
    fingerprint: str | None
    """The cache's, None where cache.json is damaged."""
    spec: ShardSpec | None
    """The teacher's, None where teacher.json is damaged: then the shard's own is believed."""
    planned: Sequence[TokenSequence] | None
    """The unit's rows, quarantined ones too; None where the plan is damaged."""
    planned_ids: Callable[[], frozenset[str]]
    """Of all units, asked for only where rows are wrong: what is not among them comes from another run."""
    owner_of: dict[str, str]
    """Unit by sha256 of its committed shard."""
    witnessed: bool
    """Read a second time with fastparquet."""
    rows: int = field(default=0, init=False)
    """Rows that were read."""

    def findings(self, data: bytes) -> Iterator[Finding]:
        """Everything that is wrong with the shard."""
        if self.fingerprint not in (None, self.commit.fingerprint):
            theirs = f"its commit is of the cache with fingerprint {self.commit.fingerprint}"
            yield self._finding("foreign", f"{theirs}, expected {self.fingerprint}")
            return
        damage = self._bytes(data)
        if damage is not None:
            yield damage
            if damage.kind == "swapped":
                return
        try:
            file = open_parquet(data, self.commit.file)
            spec = ShardSpec.from_schema(file.schema_arrow)
        except (DamageError, *_UNDECODABLE) as error:
            yield self._finding("page" if isinstance(error, ShardDamage) else "schema", _problem(error))
            return
        if self.spec is not None and spec != self.spec:
            yield self._finding("schema", "it is of another capture spec than teacher.json")
            return
        tables: list[pa.Table] = []
        yield from self._tables(file, tables)
        if len(tables) == file.num_row_groups:
            ids = [name for table in tables for name in table.column("sequence_id").to_pylist()]
            yield from self._row_set(ids)
            if damage is None:
                yield from self._commit(data, ids, tables)
            yield from self._rows(tables, spec)
        if damage is None and self.witnessed:
            for row_group, row, message in cross_reader_check.disagreements(data, tables):
                yield self._finding("disagreement", message, row_group, row)

    def _bytes(self, data: bytes) -> Finding | None:
        sha256, expected = sha256_bytes(data), self.commit.sha256
        if sha256 == expected:
            return None
        if sha256 in self.owner_of:
            return self._finding("swapped", f"it holds the shard of unit {self.owner_of[sha256]}")
        if len(data) < self.commit.bytes:
            return self._finding("truncated", f"expected {self.commit.bytes} bytes, got {len(data)}")
        return self._finding("bytes", f"expected sha256 {expected}, got {sha256} ({len(data)} bytes)")

    def _tables(self, file: pq.ParquetFile, tables: list[pa.Table]) -> Iterator[Finding]:
        """Fill `tables` with the row groups that can be read, page checksums verified."""
        for number in range(file.num_row_groups):
            try:
                tables.append(read_row_group(file, number, self.commit.file))
            except ShardDamage as error:
                yield self._finding("page", error.problem, number)
            except _UNDECODABLE as error:
                yield self._finding("page", _problem(error), number)

    def _row_set(self, ids: list[str]) -> Iterator[Finding]:
        if self.planned is None:
            return
        lost = set(self.commit.quarantined)
        expected = [sequence.sequence_id for sequence in self.planned if sequence.sequence_id not in lost]
        if ids == expected:
            return
        known = self.planned_ids()
        foreign = [name for name in ids if name not in known]
        if foreign:
            yield self._finding("foreign", f"{len(foreign)} of {len(ids)} rows are not in the plan, as {foreign[0]!r}")
        elif sorted(ids) == sorted(expected):
            yield self._finding("rows", "its rows are not in the plan's order")
        else:
            yield self._finding("rows", _row_difference(ids, expected))

    def _commit(self, data: bytes, ids: list[str], tables: list[pa.Table]) -> Iterator[Finding]:
        """Every field of the commit that its shard, or the plan, says otherwise."""
        commit, lost = self.commit, list(self.commit.quarantined)
        if self.planned is not None:
            lost = [sequence.sequence_id for sequence in self.planned if sequence.sequence_id in lost]
        tokens = sum(int(np.sum(table.column("n_tokens").to_numpy())) for table in tables)
        rightful = make_commit(commit.unit_id, commit.fingerprint, data, ids, tokens, lost)
        for line in differing_fields(commit.record(), rightful.record()):
            yield self._finding("commit", f"its commit belies it: {line}")

    def _rows(self, tables: list[pa.Table], spec: ShardSpec) -> Iterator[Finding]:
        planned = {sequence.sequence_id: sequence for sequence in self.planned or ()}
        for row_group, table in enumerate(tables):
            try:
                rows = list(to_rows(table))
            except _UNDECODABLE as error:
                yield self._finding("values", f"cannot be decoded: {_problem(error)}", row_group)
                continue
            for row in rows:
                for kind, message in _row_problems(row, spec, planned.get(row["sequence_id"])):
                    yield self._finding(kind, message, row_group, self.rows)
                self.rows += 1

    def _finding(self, kind: str, message: str, row_group: int | None = None, row: int | None = None) -> Finding:
        return Finding(kind, message, self.commit.file, row_group, row)


def _row_problems(row: dict[str, Any], spec: ShardSpec, planned: TokenSequence | None) -> Iterator[tuple[str, str]]:
    name = row["sequence_id"]
    try:
        sequence = decode_sequence(row)
        signals = decode_signals(row, len(sequence.input_ids_N), spec)
    except _UNDECODABLE as error:
        yield "values", f"{name}: cannot be decoded: {_problem(error)}"
        return
    if token_digest(sequence.input_ids_N) != row["input_digest"]:
        yield "tokens", f"{name}: input_ids: their digest is not {row['input_digest']}"
    if planned is not None:
        yield from (("tokens", f"{name}: {message}") for message in differences(sequence, planned))
    mass = impossible_mass(row, len(signals.entropy_T), spec)
    yield from (("values", f"{name}: {message}") for message in (*impossible_signals(signals, spec), *mass))


def _row_difference(ids: list[str], expected: list[str]) -> str:
    lacking = [name for name in expected if name not in ids]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    elsewhere = [name for name in ids if name not in expected]
    told = (("lacks", lacking), ("has twice", twice), ("has of other units", elsewhere))
    return "; ".join(f"{what} {len(names)} rows, as {names[0]!r}" for what, names in told if names)


def _problem(error: Exception) -> str:
    return error.problem if isinstance(error, ShardDamage) else " ".join(str(error).split())[:300]
