"""`stillhouse verify`: checks that a cache is complete, undamaged and consistent.

Order of the checks: identity, unit list, commits and manifest agree; every shard has the sha256 of its commit, valid
page checksums, the columns of the teacher's spec, and the rows of the unit list token for token; the signals satisfy
the invariants of probabilities; fastparquet reads the same values as pyarrow.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

from pipeline.cache.commit import Commit, read_commit
from pipeline.cache.description import CacheIdentity, read_identity, read_teacher
from pipeline.cache.faithfulness import Verdict, read_verdict
from pipeline.cache.format.schema import ShardSpec
from pipeline.cache.manifest import Manifest, read_manifest
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage import layout
from pipeline.cache.storage.store import Store
from pipeline.cache.unit_list import UnitList
from pipeline.cache.verify.audit import audit_cache
from pipeline.cache.verify.cross_reader_check import fastparquet_installed
from pipeline.cache.verify.findings import Finding, Report
from pipeline.cache.verify.shard_checks import ShardCheck
from pipeline.cache.verify.sidecar_checks import SidecarCheck
from pipeline.contracts import TokenSequence
from pipeline.errors import AdmissionError, DamageError, StorageError
from pipeline.identity import differing_fields, fingerprint, sha256_bytes

Progress: TypeAlias = Callable[[int, int], None]
Rows: TypeAlias = tuple[TokenSequence, ...]


def verify_cache(
    uri: str | Path | Store, *, audit: bool = False, progress: Progress = lambda done, total: None
) -> Report:
    """Check a cache, one shard in memory at a time. `progress` receives the numbers of shards checked and in total.

    Damage and unreadable files become findings. With `audit`, an undamaged cache is also compared with its exact
    distributions. Raises StorageError where there is no cache, or where it cannot be listed.
    """
    store = Store.open(uri)
    report = _Verification(store, progress).report()
    return _with_audit(report, store) if audit else report


def _with_audit(report: Report, store: Store) -> Report:
    try:
        if not report.damaged:
            return replace(report, audit=audit_cache(CacheReader.open(store)))
        reason = "a damaged cache is not audited"
    except (AdmissionError, StorageError) as error:
        reason = str(error)
    return replace(report, findings=(*report.findings, Finding("unaudited", reason)))


@dataclass
class _Verification:
    """The state of one run: the records read so far and the findings."""

    store: Store
    progress: Progress
    findings: list[Finding] = field(default_factory=list)
    identity: CacheIdentity | None = None
    """None where cache.json is damaged."""
    commits: dict[str, Commit] = field(default_factory=dict)
    shards: int = 0
    rows: int = 0
    bytes_read: int = 0

    def report(self) -> Report:
        try:
            self.identity = read_identity(self.store)
        except DamageError as error:
            self._find("identity", str(error))
        self.commits = {commit.unit_id: commit for commit in self._read_commits()}
        spec = self._read_spec()
        self.findings += self._check_notes()
        manifest = self._read_manifest()
        self.findings += self._compare_commits(manifest)
        sidecars = SidecarCheck(self.store, self.identity, spec, manifest, self.commits)
        self.findings += sidecars.findings()
        verdict = self._read_verdict()
        missing = list(self._check_shards(spec))
        self.findings += self._check_data_files(missing)
        self.findings += sidecars.unknown_files(self.unit_list, lambda: self.planned_ids)
        if not fastparquet_installed():
            self._find("not_cross_checked", "fastparquet is not installed; run: pip install 'stillhouse[verify]'")
        return Report(
            cache=self.store.uri,
            findings=tuple(self.findings),
            units=len(self.unit_list) if self.unit_list is not None else len(self.commits),
            shards=self.shards,
            rows=self.rows,
            bytes=self.bytes_read,
            cross_checked=fastparquet_installed(),
            verdict=verdict,
        )

    @cached_property
    def unit_list(self) -> UnitList | None:
        """The unit list, None where it is damaged."""
        try:
            if self.store.exists(layout.UNIT_INDEX):
                return UnitList.open(self.store)
            self._find("unit_list", "file does not exist", layout.UNIT_INDEX)
        except (DamageError, StorageError, ValueError) as error:
            self._find(_kind("unit_list", error), str(error), layout.UNIT_INDEX)
        return None

    def _read_spec(self) -> ShardSpec | None:
        try:
            teacher = read_teacher(self.store)
        except (DamageError, StorageError) as error:
            self._find(_kind("identity", error), str(error), layout.TEACHER_JSON)
            return None
        if teacher is None:
            if self.commits:
                self._find("identity", "file does not exist, although units are committed", layout.TEACHER_JSON)
            return None
        spec, identity = teacher[1], self.identity
        if identity and (lines := differing_fields(asdict(spec.capture), identity.fields.get("capture", {}))):
            self._find("identity", f"capture differs from cache.json: {'; '.join(lines)}", layout.TEACHER_JSON)
        return spec

    @cached_property
    def planned_ids(self) -> frozenset[str]:
        """The sequence ids of all units, read once a shard holds other rows than its unit's."""
        unit_ids = [] if self.unit_list is None else self.unit_list.unit_ids()
        return frozenset(row.sequence_id for unit_id in unit_ids for row in self._planned(unit_id) or ())

    def _planned(self, unit_id: str) -> Rows | None:
        """Read the unit's sequences; None where the unit list is damaged there."""
        try:
            return None if self.unit_list is None else self.unit_list.read(unit_id).sequences
        except (DamageError, StorageError, ValueError) as error:
            damage = Finding(_kind("unit_list", error), str(error))
            if damage not in self.findings:
                self.findings.append(damage)
        return None

    def _read_commits(self) -> Iterator[Commit]:
        for path in self.store.list(layout.COMMITS):
            unit_id = Path(path).stem
            try:
                layout.split_of(unit_id)
                commit = read_commit(self.store, unit_id)
            except (DamageError, StorageError) as error:
                self._find(_kind("commit", error) if layout.is_unit(unit_id) else "commit", str(error), path)
                continue
            if commit is not None and self.unit_list is not None and unit_id not in self.unit_list:
                self._find("commit", "the unit list has no such unit", path)
            elif commit is not None:
                yield commit

    def _check_notes(self) -> Iterator[Finding]:
        """Check the notes of cache.json: their digest, and the sha256 of the unit index, which hashes its files."""
        notes = {} if self.identity is None else dict(self.identity.notes)
        if notes and notes.pop("digest", None) != fingerprint(notes):
            yield Finding("identity", "notes do not match their digest", layout.CACHE_JSON)
            return
        if notes and self.unit_list is not None:
            sha256, expected = sha256_bytes(self.store.read(layout.UNIT_INDEX)), notes["plan_sha256"]
            if sha256 != expected:
                message = f"expected sha256 {expected}, as in cache.json, got {sha256}"
                yield Finding("unit_list", message, layout.UNIT_INDEX)

    def _read_manifest(self) -> Manifest | None:
        try:
            manifest = read_manifest(self.store)
        except (DamageError, StorageError) as error:
            self._find(_kind("manifest", error), str(error), layout.MANIFEST_JSON)
            return None
        if manifest is None:
            self._find("no_manifest", "file does not exist; run: stillhouse capture")
        elif self.identity is not None and manifest.fingerprint != self.identity.fingerprint:
            message = f"expected fingerprint {self.identity.fingerprint}, got {manifest.fingerprint}"
            self._find("manifest", message, layout.MANIFEST_JSON)
            return None
        return manifest

    def _compare_commits(self, manifest: Manifest | None) -> Iterator[Finding]:
        if manifest is None:
            return
        for unit_id, listed in manifest.by_unit.items():
            if unit_id not in self.commits:
                yield Finding("manifest", f"manifest lists {unit_id}, which has no commit", layout.commit_path(unit_id))
            elif listed != self.commits[unit_id]:
                differences = "; ".join(differing_fields(listed.record(), self.commits[unit_id].record()))
                yield Finding("manifest", f"manifest and commit of {unit_id} disagree: {differences}")
        newer = self.commits.keys() - manifest.by_unit.keys()
        if newer:
            yield Finding("no_manifest", f"manifest lacks {len(newer)} commits; run: stillhouse capture")

    def _read_verdict(self) -> Verdict | None:
        try:
            verdict = read_verdict(self.store)
        except (DamageError, StorageError) as error:
            self._find(_kind("faithfulness", error), str(error))
            return None
        if verdict is None:
            self._find("not_compared", "not compared with the live teacher; run: stillhouse capture")
        elif not verdict.usable:
            self._find("unfaithful", verdict.why, layout.FAITHFULNESS_JSON)
        return verdict

    def _check_shards(self, spec: ShardSpec | None) -> Iterator[Commit]:
        """Check every committed shard; yield the commits whose shard does not exist."""
        expected = None if self.identity is None else self.identity.fingerprint
        unit_of_sha256 = {commit.sha256: unit_id for unit_id, commit in self.commits.items()}
        unit_ids = list(self.commits) if self.unit_list is None else self.unit_list.unit_ids()
        for done, unit_id in enumerate(unit_ids):
            self.progress(done, len(unit_ids))
            commit, planned = self.commits.get(unit_id), self._planned(unit_id)
            if commit is None:
                self._find("uncommitted", f"{unit_id}; run: stillhouse capture")
                continue
            try:
                data = self.store.read_if_present(commit.file)
            except StorageError as error:
                self._find("unreadable", str(error), commit.file)
                continue
            if data is None:
                yield commit
            else:
                ids, cross_check = (lambda: self.planned_ids), fastparquet_installed()
                check = ShardCheck(commit, expected, spec, planned, ids, unit_of_sha256, cross_check)
                self.findings += check.findings(data)
                self.shards, self.rows = self.shards + 1, self.rows + check.rows
                self.bytes_read += len(data)
        self.progress(len(unit_ids), len(unit_ids))

    def _check_data_files(self, missing: list[Commit]) -> Iterator[Finding]:
        """Report missing and renamed shards (a file in `data/` has their sha256), and files that no commit names."""
        known = {commit.file for commit in self.commits.values()}
        unlisted = [path for path in self.store.list(layout.DATA) if path not in known]
        path_of = {sha256_bytes(self.store.read(path)): path for path in unlisted} if missing else {}
        for commit in missing:
            path = path_of.pop(commit.sha256, None)
            if path is None:
                yield Finding("missing", f"the shard of {commit.unit_id} does not exist", commit.file)
            else:
                unlisted.remove(path)
                yield Finding("renamed", f"the shard of {commit.unit_id} has the name {path}", commit.file)
        for path in [*unlisted, *self.store.temporary_files()]:
            yield Finding("unlisted", "no commit names it; stillhouse gc removes it after the grace period", path)

    def _find(self, kind: str, message: str, shard: str | None = None) -> None:
        self.findings.append(Finding(kind, message, shard))


def _kind(kind: str, error: Exception) -> str:
    """Return the kind of finding for an error: `unreadable` for the storage's, else the given kind."""
    return "unreadable" if isinstance(error, StorageError) else kind
