"""The manifest: all commits of a cache in one canonical file, derived from them and rebuildable at any time.

It also keeps the sha256 of what lies beside the shards and gives them their meaning: the teacher's description and its
LM head.

Equal content gives equal bytes, whoever captured which unit and however often: nothing in it says when, where or by
whom. A reader takes it as one consistent view of the cache.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

from pipeline.cache.commit import Commit, read_commits
from pipeline.cache.description import read_identity
from pipeline.cache.storage import fault_points, layout
from pipeline.cache.storage.store import Store
from pipeline.contracts import Split
from pipeline.errors import DamageError
from pipeline.identity import canonical_json, fingerprint, sha256_bytes

FORMAT = "stillhouse-manifest/1"

Encoded: TypeAlias = bytes


@dataclass(frozen=True)
class Manifest:
    """The commits of a cache: training units first, each split by number."""

    fingerprint: str
    commits: tuple[Commit, ...]
    beside: Mapping[str, str] = field(default_factory=dict)
    """sha256 by path of the files beside the shards. Empty while the manifest is not written."""

    @cached_property
    def by_unit(self) -> dict[str, Commit]:
        """Commits by unit id, in order."""
        return {commit.unit_id: commit for commit in self.commits}

    @property
    def rows(self) -> int:
        """Sequences."""
        return sum(commit.rows for commit in self.commits)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(commit.tokens for commit in self.commits)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(commit.bytes for commit in self.commits)

    @property
    def quarantined(self) -> tuple[str, ...]:
        """Ids of the sequences without a row."""
        return tuple(sequence_id for commit in self.commits for sequence_id in commit.quarantined)

    def unit_ids(self, split: Split) -> list[str]:
        """The split's committed units, in order."""
        return [commit.unit_id for commit in self.commits if layout.split_of(commit.unit_id) == split]

    def to_bytes(self) -> Encoded:
        """The canonical file, with a digest of itself."""
        counts = {"rows": self.rows, "tokens": self.tokens, "bytes": self.bytes}
        totals = {**counts, "quarantined": len(self.quarantined)}
        commits = [commit.record() for commit in self.commits]
        cache = {"format": FORMAT, "fingerprint": self.fingerprint, "beside": dict(self.beside)}
        record = {**cache, **totals, "commits": commits}
        return canonical_json({**record, "digest": fingerprint(record)}).encode()


def derive_manifest(store: Store) -> Manifest:
    """What the commits say now, without what lies beside them. Raises StorageError, DamageError."""
    return Manifest(read_identity(store).fingerprint, _ordered(read_commits(store)))


def write_manifest(store: Store) -> Manifest:
    """Derive the manifest from the commits and put it: the last thing that a capture does.

    A writer that slept between the two may put an older one over a newer: so it is derived again until it stands.
    """
    beside = dict(_beside(store))
    manifest = replace(derive_manifest(store), beside=beside)
    while True:
        fault_points.fault_point("before_manifest", "manifest")
        store.put(layout.MANIFEST_JSON, manifest.to_bytes())
        now = replace(derive_manifest(store), beside=beside)
        if now == manifest:
            return manifest
        manifest = now


def read_manifest(store: Store) -> Manifest | None:
    """The stored manifest, or None. Raises DamageError where it is not what `write_manifest` wrote."""
    data = store.read_if_present(layout.MANIFEST_JSON)
    if data is None:
        return None
    try:
        manifest = _from_record(json.loads(data))
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(store, repr(error)) from error
    if manifest.to_bytes() != data:
        raise _damaged(store, "its totals, its digest or its form are not those of its commits")
    return manifest


def _beside(store: Store) -> Iterator[tuple[str, str]]:
    for path in layout.SIDECARS:
        data = store.read_if_present(path)
        if data is not None:
            yield path, sha256_bytes(data)


def _from_record(record: dict[str, Any]) -> Manifest:
    if record["format"] != FORMAT:
        raise ValueError(f"format {record['format']!r}, expected {FORMAT!r}")
    commits = _ordered([Commit.from_record(entry) for entry in record["commits"]])
    return Manifest(str(record["fingerprint"]), commits, dict(record["beside"]))


def _ordered(commits: Sequence[Commit]) -> tuple[Commit, ...]:
    return tuple(sorted(commits, key=lambda commit: layout.unit_order(commit.unit_id)))


def _damaged(store: Store, why: str) -> DamageError:
    return DamageError(
        f"manifest {store.where(layout.MANIFEST_JSON)}: not what was written: {why}; "
        f"capture again to derive it anew from the commits"
    )
