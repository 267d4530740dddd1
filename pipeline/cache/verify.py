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

from pipeline.cache import layout, witness
from pipeline.cache.audit import audit_cache
from pipeline.cache.commit import Commit, read_commit
from pipeline.cache.description import CacheIdentity, read_identity, read_teacher
from pipeline.cache.faithfulness import Verdict, read_verdict
from pipeline.cache.findings import Finding, Report
from pipeline.cache.lm_head import read_lm_head
from pipeline.cache.manifest import read_manifest
from pipeline.cache.quarantine import entries
from pipeline.cache.reader import CacheReader
from pipeline.cache.schema import ShardSpec
from pipeline.cache.shard_checks import ShardCheck
from pipeline.cache.storage import Store
from pipeline.cache.units import UnitList
from pipeline.contracts import TokenSequence
from pipeline.errors import DamageError, StorageError
from pipeline.identity import difference, fingerprint, sha256_bytes
from pipeline.tokenizer.digest import TOKENIZER_FILES, digest_of_files

Progress: TypeAlias = Callable[[int, int], None]
Rows: TypeAlias = tuple[TokenSequence, ...]


def verify_cache(
    uri: str | Path | Store, *, audit: bool = False, progress: Progress = lambda done, total: None
) -> Report:
    """Check everything that can be checked; holds one shard at a time. `progress` is called with shards done and all.

    What is wrong with the cache becomes findings. With `audit` an undamaged cache is also held against its exact
    distributions. Raises StorageError where there is no cache or none can be read, AdmissionError where there is
    nothing to audit.
    """
    store = Store.open(uri)
    report = _Verification(store, progress).report()
    if not audit or report.damaged:
        return report
    return replace(report, audit=audit_cache(CacheReader.open(store)))


@dataclass
class _Verification:
    store: Store
    progress: Progress
    findings: list[Finding] = field(default_factory=list)
    commits: dict[str, Commit] = field(default_factory=dict)
    shards: int = 0
    rows: int = 0
    bytes_read: int = 0

    def report(self) -> Report:
        identity = self._identity()
        spec = self._spec(identity)
        self.commits = {commit.unit_id: commit for commit in self._commits()}
        self.findings += self._notes(identity)
        self.findings += self._manifest(identity)
        self.findings += self._beside(identity, spec)
        verdict = self._verdict()
        missing = list(self._shards(spec))
        self.findings += self._missing_and_unlisted(missing)
        if not witness.installed():
            self._find("unwitnessed", "a second reader was not asked: pip install 'stillhouse[witness]'")
        return Report(
            cache=self.store.uri,
            findings=tuple(self.findings),
            units=len(self.plan) if self.plan is not None else len(self.commits),
            shards=self.shards,
            rows=self.rows,
            bytes=self.bytes_read,
            witnessed=witness.installed(),
            verdict=verdict,
        )

    @cached_property
    def plan(self) -> UnitList | None:
        """The unit list, None where it is damaged."""
        try:
            if self.store.exists(layout.UNIT_INDEX):
                return UnitList.open(self.store)
            self._find("plan", "it is not there", layout.UNIT_INDEX)
        except (DamageError, ValueError) as error:
            self._find("plan", str(error), layout.UNIT_INDEX)
        return None

    def _identity(self) -> CacheIdentity | None:
        try:
            return read_identity(self.store)
        except DamageError as error:
            self._find("identity", str(error))
        return None

    def _spec(self, identity: CacheIdentity | None) -> ShardSpec | None:
        try:
            found = read_teacher(self.store)
        except DamageError as error:
            self._find("identity", str(error))
            return None
        if found is None:
            return None
        spec = found[1]
        if identity is not None and difference(asdict(spec.capture), identity.fields.get("capture", {})):
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
            damage = Finding("plan", str(error))
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
                self._find("commit", str(error), path)
                continue
            if commit is not None and self.plan is not None and unit_id not in self.plan:
                self._find("commit", "the plan has no such unit", path)
            elif commit is not None:
                yield commit

    def _notes(self, identity: CacheIdentity | None) -> Iterator[Finding]:
        """What preparation noted, and of the plan. The plan's index covers the other files of the plan."""
        notes = {} if identity is None else dict(identity.notes)
        if notes and notes.pop("digest", None) != fingerprint(notes):
            yield Finding("identity", "its notes do not give their digest", layout.CACHE_JSON)
            return
        if notes and self.plan is not None:
            sha256, expected = sha256_bytes(self.store.read(layout.UNIT_INDEX)), notes["plan_sha256"]
            if sha256 != expected:
                message = f"expected sha256 {expected}, as in cache.json, got {sha256}"
                yield Finding("plan", message, layout.UNIT_INDEX)

    def _manifest(self, identity: CacheIdentity | None) -> Iterator[Finding]:
        try:
            manifest = read_manifest(self.store)
        except (DamageError, StorageError) as error:
            yield Finding("manifest", str(error))
            return
        if manifest is None:
            yield Finding("no_manifest", "it is not there; run: stillhouse capture")
            return
        if identity is not None and manifest.fingerprint != identity.fingerprint:
            yield Finding("manifest", f"expected fingerprint {identity.fingerprint}, got {manifest.fingerprint}")
        for unit_id, listed in manifest.by_unit.items():
            if unit_id not in self.commits:
                yield Finding("manifest", f"it lists {unit_id}, whose commit is not there", layout.commit_path(unit_id))
            elif listed != self.commits[unit_id]:
                yield Finding("manifest", f"it says something else of {unit_id} than its commit")
        newer = self.commits.keys() - manifest.by_unit.keys()
        if newer:
            yield Finding("no_manifest", f"it lacks {len(newer)} commits; run: stillhouse capture")

    def _beside(self, identity: CacheIdentity | None, spec: ShardSpec | None) -> Iterator[Finding]:
        """What lies beside the shards: LM head, tokenizer, and why rows are quarantined."""
        try:
            head = read_lm_head(self.store)
            if head is not None and spec is not None and len(head.weight_VD) != spec.vocabulary:
                yield Finding("lm_head", f"expected {spec.vocabulary} rows, got {len(head.weight_VD)}", layout.LM_HEAD)
        except DamageError as error:
            yield Finding("lm_head", str(error))
        yield from self._tokenizer(identity)
        yield from self._quarantined()

    def _verdict(self) -> Verdict | None:
        """What the capture has found when it compared the cache with the live teacher."""
        try:
            verdict = read_verdict(self.store)
        except DamageError as error:
            self._find("faithfulness", str(error))
            return None
        if verdict is None:
            self._find("not_checked", "nobody has compared it with the live teacher; stillhouse capture does")
        elif not verdict.usable:
            self._find("unfaithful", verdict.why, layout.FAITHFULNESS_JSON)
        return verdict

    def _tokenizer(self, identity: CacheIdentity | None) -> Iterator[Finding]:
        paths = {name: f"{layout.TOKENIZER}/{name}" for name in TOKENIZER_FILES}
        there = set(self.store.list(layout.TOKENIZER))
        try:
            digest = digest_of_files({name: self.store.read(path) for name, path in paths.items() if path in there})
        except ValueError as error:
            yield Finding("tokenizer", f"cannot be read: {error}", layout.TOKENIZER)
            return
        expected = digest if identity is None else identity.fields.get("tokenizer", digest)
        if digest != expected:
            yield Finding("tokenizer", f"expected digest {expected}, got {digest}", layout.TOKENIZER)

    def _quarantined(self) -> Iterator[Finding]:
        try:
            reasons = {entry.sequence_id: entry.reason for entry in entries(self.store)}
        except DamageError as error:
            reasons = {}
            yield Finding("quarantine", str(error))
        for commit in self.commits.values():
            for name in commit.quarantined:
                yield Finding("quarantined", f"{name}: {reasons.get(name, 'no reason is recorded')}", commit.file)

    def _shards(self, spec: ShardSpec | None) -> Iterator[Commit]:
        """Check every committed shard; yields the commits whose shard is not there."""
        owner_of = {commit.sha256: unit_id for unit_id, commit in self.commits.items()}
        unit_ids = list(self.commits) if self.plan is None else self.plan.unit_ids()
        for done, unit_id in enumerate(unit_ids):
            self.progress(done, len(unit_ids))
            commit, planned = self.commits.get(unit_id), self._planned(unit_id)
            data = None if commit is None else self.store.read_if_present(commit.file)
            if commit is None:
                self._find("uncommitted", f"{unit_id}; run: stillhouse capture")
            elif data is None:
                yield commit
            else:
                self._shard(data, commit, spec, planned, owner_of)
        self.progress(len(unit_ids), len(unit_ids))

    def _shard(
        self, data: bytes, commit: Commit, spec: ShardSpec | None, planned: Rows | None, owner_of: dict[str, str]
    ) -> None:
        if planned is not None:
            planned = tuple(row for row in planned if row.sequence_id not in commit.quarantined)
        check = ShardCheck(commit, spec, planned, lambda: self.planned_ids, owner_of, witness.installed())
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
        for path in [*unlisted, *self.store.leftovers()]:
            yield Finding("unlisted", "no commit names it; stillhouse gc removes it when it is old enough", path)

    def _find(self, kind: str, message: str, shard: str | None = None) -> None:
        self.findings.append(Finding(kind, message, shard))
