"""Checks of one committed shard: against commit, unit list, spec, the invariants of signals, and fastparquet."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.commit import Commit, make_commit
from pipeline.cache.format.codecs import decode_sequence, decode_signals
from pipeline.cache.format.parquet import ShardDamage, open_parquet, read_row_group, to_rows
from pipeline.cache.format.schema import ShardSpec
from pipeline.cache.verify.cross_reader_check import reader_mismatches
from pipeline.cache.verify.findings import Finding
from pipeline.cache.verify.row_checks import sequence_differences, violated_invariants, violated_mass
from pipeline.contracts import TokenSequence
from pipeline.errors import DamageError
from pipeline.identity import differing_fields, sha256_bytes, token_digest

_DECODE_ERRORS = (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeDecodeError)


@dataclass
class ShardCheck:
    """Checks one shard's bytes. `findings()` may be called once."""

    commit: Commit
    fingerprint: str | None
    """The cache's fingerprint, None where cache.json is damaged."""
    spec: ShardSpec | None
    """The spec of teacher.json, None where that is damaged: then the shard's own spec is used."""
    planned: Sequence[TokenSequence] | None
    """The unit's sequences in the unit list, quarantined ones included; None where the list is damaged."""
    planned_ids: Callable[[], frozenset[str]]
    """Returns the sequence ids of all units, to tell rows of another unit from rows of another cache."""
    unit_of_sha256: dict[str, str]
    """Unit id by sha256 of its committed shard."""
    cross_check: bool
    """Whether to read the shard with fastparquet as well."""
    rows: int = field(default=0, init=False)
    """Number of rows read."""

    def findings(self, data: bytes) -> Iterator[Finding]:
        """Yield everything that is wrong with the shard."""
        if self.fingerprint not in (None, self.commit.fingerprint):
            other = f"commit was written for the cache with fingerprint {self.commit.fingerprint}"
            yield self._finding("foreign", f"{other}, expected {self.fingerprint}")
            return
        damage = self._check_sha256(data)
        if damage is not None:
            yield damage
            if damage.kind == "swapped":
                return
        try:
            file = open_parquet(data, self.commit.file)
            spec = ShardSpec.from_schema(file.schema_arrow)
        except (DamageError, *_DECODE_ERRORS) as error:
            yield self._finding("page" if isinstance(error, ShardDamage) else "schema", _one_line(error))
            return
        if self.spec is not None and spec != self.spec:
            differences = "; ".join(differing_fields(asdict(spec), asdict(self.spec)))
            yield self._finding("schema", f"shard and teacher.json disagree: {differences}")
            return
        yield from self._check_content(data, file, spec, intact=damage is None)

    def _check_content(self, data: bytes, file: pq.ParquetFile, spec: ShardSpec, *, intact: bool) -> Iterator[Finding]:
        tables: list[pa.Table] = []
        yield from self._read_tables(file, tables)
        if len(tables) == file.num_row_groups:
            ids = [name for table in tables for name in table.column("sequence_id").to_pylist()]
            yield from self._check_row_set(ids)
            if intact:
                yield from self._check_commit(data, ids, tables)
            yield from self._check_rows(tables, spec)
        if intact and self.cross_check:
            for row_group, row, message in reader_mismatches(data, tables):
                yield self._finding("reader_mismatch", message, row_group, row)

    def _check_sha256(self, data: bytes) -> Finding | None:
        sha256, expected = sha256_bytes(data), self.commit.sha256
        if sha256 == expected:
            return None
        if sha256 in self.unit_of_sha256:
            return self._finding("swapped", f"file holds the shard of unit {self.unit_of_sha256[sha256]}")
        if len(data) < self.commit.bytes:
            return self._finding("truncated", f"expected {self.commit.bytes} bytes, got {len(data)}")
        got = f"sha256 {sha256} ({len(data)} bytes)"
        return self._finding("sha256", f"shard and commit disagree: {got}, the commit says {expected}")

    def _read_tables(self, file: pq.ParquetFile, tables: list[pa.Table]) -> Iterator[Finding]:
        """Append the readable row groups to `tables`, with page checksums verified."""
        for number in range(file.num_row_groups):
            try:
                tables.append(read_row_group(file, number, self.commit.file))
            except (ShardDamage, *_DECODE_ERRORS) as error:
                yield self._finding("page", _one_line(error), number)

    def _check_row_set(self, ids: list[str]) -> Iterator[Finding]:
        if self.planned is None:
            return
        quarantined = set(self.commit.quarantined)
        expected = [sequence.sequence_id for sequence in self.planned if sequence.sequence_id not in quarantined]
        if ids == expected:
            return
        known = self.planned_ids()
        foreign = [name for name in ids if name not in known]
        if foreign:
            message = f"{len(foreign)} of {len(ids)} rows are not in the unit list, such as {foreign[0]!r}"
            yield self._finding("foreign", message)
        elif sorted(ids) == sorted(expected):
            yield self._finding("rows", "rows are not in the order of the unit list")
        else:
            yield self._finding("rows", _row_difference(ids, expected))

    def _check_commit(self, data: bytes, ids: list[str], tables: list[pa.Table]) -> Iterator[Finding]:
        """Compare every field of the commit with the shard, and the quarantined ids with the unit list."""
        commit, quarantined = self.commit, list(self.commit.quarantined)
        if self.planned is not None:
            quarantined = [sequence.sequence_id for sequence in self.planned if sequence.sequence_id in quarantined]
        tokens = sum(int(np.sum(table.column("n_tokens").to_numpy())) for table in tables)
        expected = make_commit(commit.unit_id, commit.fingerprint, data, ids, tokens, quarantined)
        for line in differing_fields(commit.record(), expected.record()):
            yield self._finding("commit", f"shard and commit disagree: commit field {line}")

    def _check_rows(self, tables: list[pa.Table], spec: ShardSpec) -> Iterator[Finding]:
        planned = {sequence.sequence_id: sequence for sequence in self.planned or ()}
        for row_group, table in enumerate(tables):
            try:
                rows = list(to_rows(table))
            except _DECODE_ERRORS as error:
                yield self._finding("invariant", f"cannot be decoded: {_one_line(error)}", row_group)
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
    except _DECODE_ERRORS as error:
        yield "invariant", f"{name}: cannot be decoded: {_one_line(error)}"
        return
    if (digest := token_digest(sequence.input_ids_N)) != row["input_digest"]:
        yield "tokens", f"{name}: input_ids: expected digest {row['input_digest']}, got {digest}"
    if planned is not None:
        yield from (("tokens", f"{name}: {message}") for message in sequence_differences(sequence, planned))
    messages = (*violated_invariants(signals, spec), *violated_mass(row, len(signals.entropy_T), spec))
    yield from (("invariant", f"{name}: {message}") for message in messages)


def _row_difference(ids: list[str], expected: list[str]) -> str:
    missing = [name for name in expected if name not in ids]
    duplicates = sorted({name for name in ids if ids.count(name) > 1})
    others = [name for name in ids if name not in expected]
    groups = (("missing", missing), ("duplicated", duplicates), ("of other units", others))
    return "; ".join(f"{len(names)} rows {what}, such as {names[0]!r}" for what, names in groups if names)


def _one_line(error: Exception) -> str:
    return error.problem if isinstance(error, ShardDamage) else " ".join(str(error).split())[:300]
