"""The commit protocol: one shard per unit, also under retries, races and crashes.

A shard is written under a name made of its sha256, then `commits/<unit>.json` is created if absent. The first attempt
to create it wins; a losing attempt deletes its own shard. Listings of `data/` never define what belongs to the cache.
A crash leaves at most a shard without a commit, which `gc` removes; the same command run again resumes.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.cache.damage import damage_if_invalid
from pipeline.cache.description import read_identity
from pipeline.cache.storage import fault_points, layout
from pipeline.cache.storage.store import Store
from pipeline.contracts import ScoredSequence
from pipeline.errors import DamageError
from pipeline.identity import canonical_json, sha256_bytes

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Commit:
    """The shard of a unit and a summary of its rows: the content of `commits/<unit>.json`."""

    unit_id: str
    fingerprint: str
    """Fingerprint of the cache, so that a shard copied from another cache is recognised."""
    file: str
    """Path of the shard in the store."""
    sha256: str
    """Hex sha256 of the shard's bytes."""
    bytes: int
    rows: int
    tokens: int
    """Tokens of all rows; a row of n tokens has n-1 signal rows."""
    first_sequence: str | None
    last_sequence: str | None
    sequences_sha256: str
    """`row_set_digest` of the rows' sequence ids, in row order."""
    quarantined: tuple[str, ...] = ()
    """Sequences of the unit that the teacher could not process, in unit order: they have no row."""
    won: bool = True
    """Whether this attempt's shard is the committed one. Not stored."""

    def record(self) -> dict[str, Any]:
        """Return the fields that are stored as JSON."""
        fields = asdict(self)
        del fields["won"]
        return fields

    @classmethod
    def from_record(cls, record: Any) -> "Commit":
        """Parse `record`'s JSON. Raises TypeError, ValueError or KeyError where it is no commit."""
        fields = dict(record)
        commit = cls(**{**fields, "quarantined": tuple(fields["quarantined"])})
        counts = (commit.bytes, commit.rows, commit.tokens)
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"bytes, rows, tokens: expected integers of 0 or more, got {counts}")
        if not _SHA256.fullmatch(commit.fingerprint):
            raise ValueError(f"fingerprint: expected a sha256, got {commit.fingerprint!r}")
        if not _SHA256.fullmatch(commit.sha256) or commit.file != layout.shard_path(commit.unit_id, commit.sha256):
            raise ValueError(f"file: expected the name made of sha256 {commit.sha256!r}, got {commit.file!r}")
        return commit


def commit_unit(
    store: Store, unit_id: str, data: bytes, rows: Sequence[ScoredSequence], quarantined: Sequence[str] = ()
) -> Commit:
    """Commit `data`, the shard of these `rows`, unless the unit already has a commit.

    May be repeated and run concurrently. Returns the unit's commit, with `won` False where another attempt's shard is
    committed. Raises StorageError, and DamageError where the store does not hold what was written.
    """
    sequences = [row.sequence for row in rows]
    ids, tokens = [sequence.sequence_id for sequence in sequences], sum(len(s.input_ids_N) for s in sequences)
    attempt = make_commit(unit_id, read_identity(store).fingerprint, data, ids, tokens, quarantined)
    committed = read_commit(store, unit_id)
    if committed is None:
        _put_shard(store, attempt, data)
        fault_points.fault_point("before_commit", unit_id)
        if store.put_if_absent(layout.commit_path(unit_id), canonical_json(attempt.record()).encode()):
            fault_points.fault_point("after_commit", unit_id)
            return attempt
        committed = _read_winner(store, attempt)
        if committed.file != attempt.file:
            store.delete(attempt.file)
    return replace(committed, won=committed == attempt)


def read_commit(store: Store, unit_id: str) -> Commit | None:
    """Return the unit's commit, or None where there is none. Raises DamageError where it is invalid."""
    path = layout.commit_path(unit_id)
    data = store.read_if_present(path)
    return None if data is None else _parse(store, path, data)


def committed_units(store: Store) -> list[str]:
    """List the ids of the committed units, training first, each split by number. Opens no file."""
    paths = store.list(layout.COMMITS)
    return sorted(
        (path.removeprefix(f"{layout.COMMITS}/").removesuffix(".json") for path in paths), key=layout.unit_sort_key
    )


def read_commits(store: Store) -> list[Commit]:
    """Read every commit, in the order of `committed_units`. Raises DamageError where one is invalid."""
    paths = [layout.commit_path(unit_id) for unit_id in committed_units(store)]
    return [_parse(store, path, data) for path, data in zip(paths, store.read_many(paths), strict=True)]


def row_set_digest(sequence_ids: Iterable[str]) -> str:
    """Hash sequence ids in row order, each followed by a newline: hex sha256."""
    return sha256_bytes("".join(f"{sequence_id}\n" for sequence_id in sequence_ids).encode())


def make_commit(
    unit_id: str, fingerprint: str, data: bytes, sequence_ids: Sequence[str], tokens: int, quarantined: Sequence[str]
) -> Commit:
    """Describe a shard's bytes, which hold the rows of these sequences. Raises StorageError for an invalid unit id."""
    layout.split_of(unit_id)
    sha256 = sha256_bytes(data)
    return Commit(
        unit_id=unit_id,
        fingerprint=fingerprint,
        file=layout.shard_path(unit_id, sha256),
        sha256=sha256,
        bytes=len(data),
        rows=len(sequence_ids),
        tokens=tokens,
        first_sequence=sequence_ids[0] if sequence_ids else None,
        last_sequence=sequence_ids[-1] if sequence_ids else None,
        sequences_sha256=row_set_digest(sequence_ids),
        quarantined=tuple(quarantined),
    )


def _put_shard(store: Store, attempt: Commit, data: bytes) -> None:
    """Write the shard even if it exists: a new modification time keeps `gc` from deleting it as an old orphan."""
    fault_points.fault_point("before_write", attempt.unit_id)
    store.put(attempt.file, data, midway=lambda: fault_points.fault_point("mid_write", attempt.unit_id))
    fault_points.fault_point("after_write", attempt.unit_id)
    size = store.size(attempt.file)
    if size != attempt.bytes:
        where = store.where(attempt.file)
        raise DamageError(f"shard {where}: expected {attempt.bytes} bytes after the write, got {size}")


def _read_winner(store: Store, attempt: Commit) -> Commit:
    committed = read_commit(store, attempt.unit_id)
    if committed is None:
        path = store.where(layout.commit_path(attempt.unit_id))
        raise DamageError(f"commit {path}: expected the one of a concurrent attempt, got none; run the capture again")
    return committed


def _parse(store: Store, path: str, data: bytes) -> Commit:
    with damage_if_invalid(f"commit {store.where(path)}"):
        commit = Commit.from_record(json.loads(data))
        if layout.commit_path(commit.unit_id) != path:
            raise ValueError(f"unit_id: expected the one in the file's name, got {commit.unit_id!r}")
        return commit
