"""What lies beside a cache's shards: teacher, LM head, tokenizer, reasons of quarantine, and nothing else.

No commit names these files. The manifest keeps the sha256 of the first two, the identity the tokenizer's digest.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.commit import Commit
from pipeline.cache.description import CacheIdentity
from pipeline.cache.format.schema import ShardSpec
from pipeline.cache.lm_head import read_lm_head
from pipeline.cache.manifest import Manifest
from pipeline.cache.quarantine import entries
from pipeline.cache.storage import layout
from pipeline.cache.storage.store import Store
from pipeline.cache.unit_list import UnitList
from pipeline.cache.verify.findings import Finding
from pipeline.errors import DamageError, StorageError
from pipeline.identity import sha256_bytes
from pipeline.models.tokenizers.digest import TOKENIZER_FILES, digest_tokenizer_files

_KIND_OF = {layout.TEACHER_JSON: "identity", layout.LM_HEAD: "lm_head"}
_KNOWN = {
    layout.CACHE_JSON,
    layout.MANIFEST_JSON,
    layout.FAITHFULNESS_JSON,
    layout.TIMING_JSON,
    *layout.SIDECARS,
    layout.UNIT_INDEX,
}
_KNOWN |= {f"{layout.TOKENIZER}/{name}" for name in TOKENIZER_FILES}


@dataclass(frozen=True, slots=True)
class SidecarCheck:
    """Checks everything that is no shard and no commit. Each of the four records is None where it is damaged."""

    store: Store
    identity: CacheIdentity | None
    spec: ShardSpec | None
    manifest: Manifest | None
    commits: Mapping[str, Commit]

    def findings(self) -> Iterator[Finding]:
        """Everything that is wrong, or cannot be read."""
        checks = (
            (self._as_listed, layout.MANIFEST_JSON),
            (self._lm_head, layout.LM_HEAD),
            (self._tokenizer, layout.TOKENIZER),
            (self._quarantined, layout.QUARANTINE),
        )
        for check, place in checks:
            try:
                yield from check()
            except StorageError as error:
                yield Finding("unreadable", str(error), place)

    def strays(self, plan: UnitList | None, planned_ids: Callable[[], frozenset[str]]) -> Iterator[Finding]:
        """Files that nothing here writes or reads. Those in `data/` and `commits/` are looked at elsewhere."""
        lost = {name for commit in self.commits.values() for name in commit.quarantined}
        for path in self.store.list():
            folder = path.partition("/")[0]
            known = path in _KNOWN or folder in (layout.DATA, layout.COMMITS) or layout.is_answers_path(path)
            if folder == layout.UNITS:
                known |= plan is None or path in plan.paths()
            elif folder == layout.QUARANTINE:
                known |= Path(path).stem in lost or plan is None or Path(path).stem in planned_ids()
            if not known:
                yield Finding("unlisted", "nothing here writes or reads a file of that name", path)

    def _as_listed(self) -> Iterator[Finding]:
        """The files that the manifest keeps a sha256 of."""
        listed = {} if self.manifest is None else self.manifest.sidecar_sha256
        if self.manifest is not None and self.commits and layout.TEACHER_JSON not in listed:
            yield Finding("manifest", f"it does not list {layout.TEACHER_JSON}", layout.MANIFEST_JSON)
        for path, expected in listed.items():
            data = self.store.read_if_present(path)
            got = "no such file" if data is None else sha256_bytes(data)
            if got != expected:
                message = f"expected sha256 {expected}, as in {layout.MANIFEST_JSON}, got {got}"
                yield Finding(_KIND_OF.get(path, "manifest"), message, path)

    def _lm_head(self) -> Iterator[Finding]:
        try:
            head = read_lm_head(self.store)
        except DamageError as error:
            yield Finding("lm_head", str(error), layout.LM_HEAD)
            return
        if head is not None and self.spec is not None and len(head.weight_VD) != self.spec.vocabulary:
            yield Finding("lm_head", f"expected {self.spec.vocabulary} rows, got {len(head.weight_VD)}", layout.LM_HEAD)

    def _tokenizer(self) -> Iterator[Finding]:
        paths = {name: f"{layout.TOKENIZER}/{name}" for name in TOKENIZER_FILES}
        there = set(self.store.list(layout.TOKENIZER))
        try:
            digest = digest_tokenizer_files(
                {name: self.store.read(path) for name, path in paths.items() if path in there}
            )
        except ValueError as error:
            yield Finding("tokenizer", f"cannot be read: {error}", layout.TOKENIZER)
            return
        expected = digest if self.identity is None else self.identity.fields.get("tokenizer", digest)
        if digest != expected:
            yield Finding("tokenizer", f"expected digest {expected}, got {digest}", layout.TOKENIZER)

    def _quarantined(self) -> Iterator[Finding]:
        reasons: dict[str, str] = {}
        try:
            reasons = {entry.sequence_id: entry.reason for entry in entries(self.store)}
        except DamageError as error:
            yield Finding("quarantine", str(error))
        for commit in self.commits.values():
            for name in commit.quarantined:
                yield Finding("quarantined", f"{name}: {reasons.get(name, 'no reason is recorded')}", commit.file)
