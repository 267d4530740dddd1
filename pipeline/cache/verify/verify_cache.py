"""Is this cache what was committed, all of it, and can it be true? Trusts nothing that it can check.

The checks, from the outside in: identity, plan, commits and manifest agree; every shard has its committed sha256, its
pages their checksums, its columns the teacher's spec; its rows are the plan's, token for token; the signals obey the
laws of probability; and fastparquet, an independent reader, gets the same values.
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
from pipeline.cache.verify import cross_reader_check
from pipeline.cache.verify.audit import audit_cache
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
    """Check everything that can be checked; holds one shard at a time. `progress` is called with shards done and all.

    What is wrong with the cache becomes findings, and so does what cannot be read of it. With `audit` an undamaged
    cache is also held against its exact distributions. Raises StorageError where there is no cache or no way to it.
    """
    store = Store.open(uri)
    report = _Verification(store, progress).report()
    return _audited(report, store) if audit else report


def _audited(report: Report, store: Store) -> Report:
    try:
        if not report.damaged:
            return replace(report, audit=audit_cache(CacheReader.open(store)))
        why = "a damaged cache is not audited"
    except (AdmissionError, StorageError) as error:
        why = str(error)
    return replace(report, findings=(*report.findings, Finding("unaudited", why)))


@dataclass
class _Verification:
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
        self.identity = self._identity()
        self.commits = {commit.unit_id: commit for commit in self._commits()}
        spec = self._spec()
        self.findings += self._notes()
        manifest = self._manifest()
        self.findings += self._against_commits(manifest)
        beside = SidecarCheck(self.store, self.identity, spec, manifest, self.commits)
        self.findings += beside.findings()
        verdict = self._verdict()
        missing = list(self._shards(spec))
        self.findings += self._missing_and_unlisted(missing)
        self.findings += beside.strays(self.plan, lambda: self.planned_ids)
        if not cross_reader_check.installed():
            self._find("unwitnessed", "a second reader was not asked: pip install 'stillhouse[verify]'")
        return Report(
            cache=self.store.uri,
            findings=tuple(self.findings),
            units=len(self.plan) if self.plan is not None else len(self.commits),
            shards=self.shards,
            rows=self.rows,
            bytes=self.bytes_read,
            witnessed=cross_reader_check.installed(),
            verdict=verdict,
        )

    @cached_property
    def plan(self) -> UnitList | None:
        """The unit list, None where it is damaged."""
        try:
            if self.store.exists(layout.UNIT_INDEX):
                return UnitList.open(self.store)
            self._find("plan", "it is not there", layout.UNIT_INDEX)
        except (DamageError, StorageError, ValueError) as error:
            self._find(_kind("plan", error), str(error), layout.UNIT_INDEX)
        return None

    def _identity(self) -> CacheIdentity | None:
        try:
            return read_identity(self.store)
        except DamageError as error:
            self._find("identity", str(error))
        return None

    def _spec(self) -> ShardSpec | None:
        try:
            found = read_teacher(self.store)
        except (DamageError, StorageError) as error:
            self._find(_kind("identity", error), str(error), layout.TEACHER_JSON)
            return None
        if found is None:
            if self.commits:
                self._find("identity", "it is not there, though units are committed", layout.TEACHER_JSON)
            return None
        spec = found[1]
        if self.identity is not None and differing_fields(
            asdict(spec.capture), self.identity.fields.get("capture", {})
        ):
            self._find("identity", "it is of another capture spec than cache.json", layout.TEACHER_JSON)
        return spec

    @cached_property
    def planned_ids(self) -> frozenset[str]:
        """Of all units: gathered when the first shard holds other rows than its unit's."""
        unit_ids = [] if self.plan is None else self.plan.unit_ids()
        return frozenset(row.sequence_id for unit_id in unit_ids for row in self._planned(unit_id) or ())

    def _planned(self, unit_id: str) -> Rows | None:
        """The unit's sequences, None where the plan is damaged there."""
        try:
            return None if self.plan is None else self.plan.read(unit_id).sequences
        except (DamageError, StorageError, ValueError) as error:
            damage = Finding(_kind("plan", error), str(error))
            if damage not in self.findings:
                self.findings.append(damage)
        return None

    def _commits(self) -> Iterator[Commit]:
        for path in self.store.list(layout.COMMITS):
            unit_id = Path(path).stem
            try:
                layout.split_of(unit_id)
                commit = read_commit(self.store, unit_id)
            except (DamageError, StorageError) as error:
                self._find(_kind("commit", error) if layout.is_unit(unit_id) else "commit", str(error), path)
                continue
            if commit is not None and self.plan is not None and unit_id not in self.plan:
                self._find("commit", "the plan has no such unit", path)
            elif commit is not None:
                yield commit

    def _notes(self) -> Iterator[Finding]:
        """What preparation noted, and of the plan. The plan's index covers the other files of the plan."""
        notes = {} if self.identity is None else dict(self.identity.notes)
        if notes and notes.pop("digest", None) != fingerprint(notes):
            yield Finding("identity", "its notes do not give their digest", layout.CACHE_JSON)
            return
        if notes and self.plan is not None:
            sha256, expected = sha256_bytes(self.store.read(layout.UNIT_INDEX)), notes["plan_sha256"]
            if sha256 != expected:
                message = f"expected sha256 {expected}, as in cache.json, got {sha256}"
                yield Finding("plan", message, layout.UNIT_INDEX)

    def _manifest(self) -> Manifest | None:
        try:
            manifest = read_manifest(self.store)
        except (DamageError, StorageError) as error:
            self._find(_kind("manifest", error), str(error), layout.MANIFEST_JSON)
            return None
        if manifest is None:
            self._find("no_manifest", "it is not there; run: stillhouse capture")
        elif self.identity is not None and manifest.fingerprint != self.identity.fingerprint:
            expected = self.identity.fingerprint
            self._find("manifest", f"it is of the cache with fingerprint {manifest.fingerprint}, expected {expected}")
            return None
        return manifest

    def _against_commits(self, manifest: Manifest | None) -> Iterator[Finding]:
        if manifest is None:
            return
        for unit_id, listed in manifest.by_unit.items():
            if unit_id not in self.commits:
                yield Finding("manifest", f"it lists {unit_id}, whose commit is not there", layout.commit_path(unit_id))
            elif listed != self.commits[unit_id]:
                yield Finding("manifest", f"it says something else of {unit_id} than its commit")
        newer = self.commits.keys() - manifest.by_unit.keys()
        if newer:
            yield Finding("no_manifest", f"it lacks {len(newer)} commits; run: stillhouse capture")

    def _verdict(self) -> Verdict | None:
        """What the capture has found when it compared the cache with the live teacher."""
        try:
            verdict = read_verdict(self.store)
        except (DamageError, StorageError) as error:
            self._find(_kind("faithfulness", error), str(error))
            return None
        if verdict is None:
            self._find("not_checked", "nobody has compared it with the live teacher; stillhouse capture does")
        elif not verdict.usable:
            self._find("unfaithful", verdict.why, layout.FAITHFULNESS_JSON)
        return verdict

    def _shards(self, spec: ShardSpec | None) -> Iterator[Commit]:
        """Check every committed shard; yields the commits whose shard is not there."""
        owner_of = {commit.sha256: unit_id for unit_id, commit in self.commits.items()}
        unit_ids = list(self.commits) if self.plan is None else self.plan.unit_ids()
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
                self._shard(data, commit, spec, planned, owner_of)
        self.progress(len(unit_ids), len(unit_ids))

    def _shard(
        self, data: bytes, commit: Commit, spec: ShardSpec | None, planned: Rows | None, owner_of: dict[str, str]
    ) -> None:
        expected = None if self.identity is None else self.identity.fingerprint
        check = ShardCheck(
            commit, expected, spec, planned, lambda: self.planned_ids, owner_of, cross_reader_check.installed()
        )
        self.findings += check.findings(data)
        self.shards += 1
        self.rows += check.rows
        self.bytes_read += len(data)

    def _missing_and_unlisted(self, missing: list[Commit]) -> Iterator[Finding]:
        """Shards that are not there, and files that no commit names: the one may be the other, renamed."""
        known = {commit.file for commit in self.commits.values()}
        unlisted = [path for path in self.store.list(layout.DATA) if path not in known]
        path_of = {sha256_bytes(self.store.read(path)): path for path in unlisted} if missing else {}
        for commit in missing:
            path = path_of.get(commit.sha256)
            if path is None:
                yield Finding("missing", f"the shard of {commit.unit_id} is not there", commit.file)
            else:
                unlisted.remove(path)
                yield Finding("renamed", f"the shard of {commit.unit_id} is there as {path}", commit.file)
        for path in [*unlisted, *self.store.temporary_files()]:
            yield Finding("unlisted", "no commit names it; stillhouse gc removes it when it is old enough", path)

    def _find(self, kind: str, message: str, shard: str | None = None) -> None:
        self.findings.append(Finding(kind, message, shard))


def _kind(kind: str, error: Exception) -> str:
    """What a file's failure is: damage of its kind, or that nobody could read it."""
    return "unreadable" if isinstance(error, StorageError) else kind
