"""The manifest: all commits of a cache in one canonical JSON file, derived from them and rebuildable at any time.

It also holds the sha256 of the sidecar files (`teacher.json`, the LM head), which decoding needs and no commit names.
Equal content gives equal bytes: it holds no time, host or writer. A reader takes it as a snapshot of the cache.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

from pipeline.cache.commit import Commit, read_commits
from pipeline.cache.damage import damage_if_invalid
from pipeline.cache.description import read_identity
from pipeline.cache.storage import fault_points, layout
from pipeline.cache.storage.store import Store
from pipeline.contracts import Split
from pipeline.identity import canonical_json, fingerprint, sha256_bytes

FORMAT = "stillhouse-manifest/1"

Encoded: TypeAlias = bytes
"""`Manifest.bytes` hides the builtin name in its class."""


@dataclass(frozen=True)
class Manifest:
    """The commits of a cache: training units first, each split by number."""

    fingerprint: str
    commits: tuple[Commit, ...]
    sidecar_sha256: Mapping[str, str] = field(default_factory=dict)
    """Hex sha256 of each sidecar file by path. Empty in a manifest that was derived and not written."""

    @cached_property
    def by_unit(self) -> dict[str, Commit]:
        """Commits by unit id, in the order of `commits`."""
        return {commit.unit_id: commit for commit in self.commits}

    @property
    def rows(self) -> int:
        """Number of rows (sequences)."""
        return sum(commit.rows for commit in self.commits)

    @property
    def tokens(self) -> int:
        """Number of tokens of all rows."""
        return sum(commit.tokens for commit in self.commits)

    @property
    def bytes(self) -> int:
        """Size of all shards."""
        return sum(commit.bytes for commit in self.commits)

    @property
    def quarantined(self) -> tuple[str, ...]:
        """Ids of the sequences that have no row."""
        return tuple(sequence_id for commit in self.commits for sequence_id in commit.quarantined)

    def unit_ids(self, split: Split) -> list[str]:
        """List the split's committed units, by number."""
        return [commit.unit_id for commit in self.commits if layout.split_of(commit.unit_id) == split]

    def to_bytes(self) -> Encoded:
        """Serialise as canonical JSON, with a digest of the content."""
        counts = {"rows": self.rows, "tokens": self.tokens, "bytes": self.bytes}
        totals = {**counts, "quarantined": len(self.quarantined)}
        commits = [commit.record() for commit in self.commits]
        cache = {"format": FORMAT, "fingerprint": self.fingerprint, "beside": dict(self.sidecar_sha256)}
        record = {**cache, **totals, "commits": commits}
        return canonical_json({**record, "digest": fingerprint(record)}).encode()


def derive_manifest(store: Store) -> Manifest:
    """Build the manifest of the present commits, without sidecars. Raises StorageError, DamageError."""
    return Manifest(read_identity(store).fingerprint, _sorted(read_commits(store)))


def write_manifest(store: Store) -> Manifest:
    """Derive the manifest from the commits and write it: the last step of a capture.

    A slow writer may replace a newer manifest by an older one, so the commits are read again after each write and the
    manifest is rewritten until both agree.
    """
    data = {path: store.read_if_present(path) for path in layout.SIDECARS}
    sidecars = {path: sha256_bytes(content) for path, content in data.items() if content is not None}
    manifest = replace(derive_manifest(store), sidecar_sha256=sidecars)
    while True:
        fault_points.fault_point("before_manifest", "manifest")
        store.put(layout.MANIFEST_JSON, manifest.to_bytes())
        current = replace(derive_manifest(store), sidecar_sha256=sidecars)
        if current == manifest:
            return manifest
        manifest = current


def read_manifest(store: Store) -> Manifest | None:
    """Read the stored manifest; None where there is none. Raises DamageError where it is invalid."""
    data = store.read_if_present(layout.MANIFEST_JSON)
    if data is None:
        return None
    remedy = "run the same capture again to rebuild it from the commits"
    with damage_if_invalid(f"manifest {store.where(layout.MANIFEST_JSON)}", remedy):
        record = json.loads(data)
        if record["format"] != FORMAT:
            raise ValueError(f"format: expected {FORMAT!r}, got {record['format']!r}")
        commits = _sorted([Commit.from_record(entry) for entry in record["commits"]])
        manifest = Manifest(str(record["fingerprint"]), commits, dict(record["beside"]))
        if manifest.to_bytes() != data:
            raise ValueError("expected the totals, the digest and the canonical form of its commits, got other bytes")
    return manifest


def _sorted(commits: Sequence[Commit]) -> tuple[Commit, ...]:
    return tuple(sorted(commits, key=lambda commit: layout.unit_sort_key(commit.unit_id)))
