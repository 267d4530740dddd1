"""How a unit's shard becomes part of the cache, however often and by whoever it is captured.

The shard is put aside under a name made of its content, then `commits/<unit>.json` is created if absent: whoever
creates it has won, and the loser deletes its own file. No listing of `data/` ever says what belongs to the cache. A
writer that dies leaves a file that no commit names, which `gc` removes; running again is the resume.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.cache.description import read_identity
from pipeline.cache.storage import fault_points, layout
from pipeline.cache.storage.store import Store
from pipeline.contracts import ScoredSequence
from pipeline.errors import DamageError
from pipeline.identity import canonical_json, sha256_bytes

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Commit:
    """Which shard stands for a unit, and what is in it."""

    unit_id: str
    fingerprint: str
    """Of the cache that it was captured for: a shard and its commit that were copied from another run say so."""
    file: str
    """Path of the shard in the store."""
    sha256: str
    """Of the shard's bytes."""
    bytes: int
    rows: int
    tokens: int
    """Tokens of all rows: each row of n has n-1 signal rows."""
    first_sequence: str | None
    last_sequence: str | None
    sequences_sha256: str
    """`row_set_digest` of the rows' sequence ids, in row order."""
    quarantined: tuple[str, ...] = ()
    """Sequences of the unit that the teacher could not process, in unit order: they have no row."""
    won: bool = True
    """Whether this attempt's content stands. Not stored."""

    def record(self) -> dict[str, Any]:
        """What is stored."""
        fields = asdict(self)
        del fields["won"]
        return fields

    @classmethod
    def from_record(cls, record: Any) -> "Commit":
        """Back from `record`'s JSON. Raises TypeError, ValueError or KeyError where it is no commit."""
        fields = dict(record)
        commit = cls(**{**fields, "quarantined": tuple(fields["quarantined"])})
        counts = (commit.bytes, commit.rows, commit.tokens)
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"bytes, rows, tokens: expected counts, got {counts}")
        if not _SHA256.fullmatch(commit.fingerprint):
            raise ValueError(f"fingerprint: expected a sha256, got {commit.fingerprint!r}")
        if not _SHA256.fullmatch(commit.sha256) or commit.file != layout.shard_path(commit.unit_id, commit.sha256):
            raise ValueError(f"file {commit.file!r} is not named by the sha256 {commit.sha256!r}")
        return commit


def commit_unit(
    store: Store, unit_id: str, data: bytes, rows: Sequence[ScoredSequence], quarantined: Sequence[str] = ()
) -> Commit:
    """Make `data`, the shard of these `rows`, stand for the unit, unless another one does.

    Safe to repeat and to race. Returns the commit that stands, with `won` False where it is another content's.
    Raises StorageError, and DamageError where the store did not keep what was put.
    """
    sequences = [row.sequence for row in rows]
    ids, tokens = [sequence.sequence_id for sequence in sequences], sum(len(s.input_ids_N) for s in sequences)
    mine = make_commit(unit_id, read_identity(store).fingerprint, data, ids, tokens, quarantined)
    standing = read_commit(store, unit_id)
    if standing is None:
        _put_shard(store, mine, data)
        fault_points.fault_point("before_commit", unit_id)
        if store.put_if_absent(layout.commit_path(unit_id), canonical_json(mine.record()).encode()):
            fault_points.fault_point("after_commit", unit_id)
            return mine
        standing = _concede(store, mine)
    return replace(standing, won=standing == mine)


def read_commit(store: Store, unit_id: str) -> Commit | None:
    """The unit's commit, or None. Raises DamageError where it is unreadable."""
    path = layout.commit_path(unit_id)
    data = store.read_if_present(path)
    return None if data is None else _parse(store, path, data)


def committed_units(store: Store) -> list[str]:
    """Ids of the committed units, training first, each split by number: one listing, no file is opened."""
    paths = store.list(layout.COMMITS)
    return sorted(
        (path.removeprefix(f"{layout.COMMITS}/").removesuffix(".json") for path in paths), key=layout.unit_order
    )


def read_commits(store: Store) -> list[Commit]:
    """Every commit, in the order of `committed_units`. Raises DamageError where one is unreadable."""
    paths = [layout.commit_path(unit_id) for unit_id in committed_units(store)]
    return [_parse(store, path, data) for path, data in zip(paths, store.read_many(paths), strict=True)]


def row_set_digest(sequence_ids: Iterable[str]) -> str:
    """Hex sha256 of sequence ids in row order, a newline after each."""
    digest = hashlib.sha256()
    for sequence_id in sequence_ids:
        digest.update(f"{sequence_id}\n".encode())
    return digest.hexdigest()


def make_commit(
    unit_id: str, fingerprint: str, data: bytes, sequence_ids: Sequence[str], tokens: int, quarantined: Sequence[str]
) -> Commit:
    """The commit of a shard's bytes, which hold the rows of these sequences. StorageError where it is no unit."""
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


def _put_shard(store: Store, mine: Commit, data: bytes) -> None:
    """Put it even if its name is there: an old orphan's date would let `gc` remove it before the commit."""
    fault_points.fault_point("before_write", mine.unit_id)
    store.put(mine.file, data, midway=lambda: fault_points.fault_point("mid_write", mine.unit_id))
    fault_points.fault_point("after_write", mine.unit_id)
    kept = store.size(mine.file)
    if kept != mine.bytes:
        raise DamageError(f"shard {store.where(mine.file)}: expected {mine.bytes} bytes after the write, got {kept}")


def _concede(store: Store, mine: Commit) -> Commit:
    standing = read_commit(store, mine.unit_id)
    if standing is None:
        raise DamageError(f"commit of {mine.unit_id} in {store.uri}: expected the one that won, got none")
    if standing.file != mine.file:
        store.delete(mine.file)
    return standing


def _parse(store: Store, path: str, data: bytes) -> Commit:
    try:
        commit = Commit.from_record(json.loads(data))
        if layout.commit_path(commit.unit_id) != path:
            raise ValueError(f"it is of unit {commit.unit_id!r}")
        return commit
    except (ValueError, TypeError, KeyError) as error:
        raise DamageError(f"commit {store.where(path)}: not what was written: {error!r}") from error
