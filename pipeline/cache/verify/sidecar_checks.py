"""Checks of the files beside shards and commits: teacher, LM head, tokenizer, quarantine entries, unknown files.

The manifest holds the sha256 of `teacher.json` and the LM head, `cache.json` the digest of the tokenizer.
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
_KNOWN = {layout.CACHE_JSON, layout.MANIFEST_JSON, layout.FAITHFULNESS_JSON, layout.TIMING_JSON, layout.UNIT_INDEX}
_KNOWN |= set(layout.SIDECARS)
_KNOWN |= {f"{layout.TOKENIZER}/{name}" for name in TOKENIZER_FILES}


@dataclass(frozen=True, slots=True)
class SidecarCheck:
    """Checks all files that are neither shard nor commit. `identity`, `spec`, `manifest` are None where damaged."""

    store: Store
    identity: CacheIdentity | None
    spec: ShardSpec | None
    manifest: Manifest | None
    commits: Mapping[str, Commit]

    def findings(self) -> Iterator[Finding]:
        """Yield everything that is wrong or cannot be read."""
        checks = (
            (self._manifest_digests, layout.MANIFEST_JSON),
            (self._lm_head, layout.LM_HEAD),
            (self._tokenizer, layout.TOKENIZER),
            (self._quarantined, layout.QUARANTINE),
        )
        for check, path in checks:
            try:
                yield from check()
            except StorageError as error:
                yield Finding("unreadable", str(error), path)

    def unknown_files(self, unit_list: UnitList | None, planned_ids: Callable[[], frozenset[str]]) -> Iterator[Finding]:
        """Yield the files outside `data/` and `commits/` that stillhouse does not write."""
        quarantined = {name for commit in self.commits.values() for name in commit.quarantined}
        for path in self.store.list():
            folder = path.partition("/")[0]
            known = path in _KNOWN or folder in (layout.DATA, layout.COMMITS) or layout.is_answers_path(path)
            if folder == layout.UNITS:
                known |= unit_list is None or path in unit_list.paths()
            elif folder == layout.QUARANTINE:
                name = Path(path).stem
                known |= name in quarantined or unit_list is None or name in planned_ids()
            if not known:
                yield Finding("unlisted", "stillhouse writes no file of that name", path)

    def _manifest_digests(self) -> Iterator[Finding]:
        digests = {} if self.manifest is None else self.manifest.sidecar_sha256
        if self.manifest is not None and self.commits and layout.TEACHER_JSON not in digests:
            yield Finding("manifest", f"expected the sha256 of {layout.TEACHER_JSON}, found none", layout.MANIFEST_JSON)
        for path, expected in digests.items():
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
        stored = {name: self.store.read_if_present(f"{layout.TOKENIZER}/{name}") for name in TOKENIZER_FILES}
        try:
            digest = digest_tokenizer_files({name: data for name, data in stored.items() if data is not None})
        except ValueError as error:
            yield Finding("tokenizer", f"cannot be parsed: {error}", layout.TOKENIZER)
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
                yield Finding("quarantined", f"{name}: {reasons.get(name, 'no reason recorded')}", commit.file)
