"""The identity of a cache (`cache.json`, written by preparation) and its teacher (`teacher.json`, by an engine)."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from pipeline.cache.damage import damage_if_invalid
from pipeline.cache.format.schema import ShardSpec, parse_capture
from pipeline.cache.storage import layout
from pipeline.cache.storage.store import Store
from pipeline.contracts import TeacherDescription
from pipeline.errors import DamageError, IdentityError, StorageError
from pipeline.identity import canonical_json, differing_fields, fingerprint

_TEACHER_IDENTITY = ("name", "architecture", "vocabulary", "layers", "hidden_width", "dtype", "engine")


@dataclass(frozen=True, slots=True)
class CacheIdentity:
    """Everything that changes a byte of a cache, its fingerprint, and notes that do not change one."""

    fields: Mapping[str, Any]
    fingerprint: str
    notes: Mapping[str, Any] = field(default_factory=dict)


def write_cache_identity(
    store: Store, fields: Mapping[str, Any], notes: Mapping[str, Any] = MappingProxyType({})
) -> CacheIdentity:
    """Create `cache.json` with these fields. Raises IdentityError where the store is a cache of other fields."""
    record = {"fingerprint": fingerprint(fields), "identity": dict(fields), "notes": dict(notes)}
    if not store.put_if_absent(layout.CACHE_JSON, (canonical_json(record) + "\n").encode()):
        check_identity(store, fields)
    return read_identity(store)


def read_identity(store: Store) -> CacheIdentity:
    """Read `cache.json`. Raises StorageError where there is none, DamageError where it was changed."""
    data = store.read_if_present(layout.CACHE_JSON)
    if data is None:
        raise StorageError(f"{store.uri}: expected a cache, found no {layout.CACHE_JSON}")
    with damage_if_invalid(store.where(layout.CACHE_JSON)):
        record = json.loads(data)
        identity = CacheIdentity(dict(record["identity"]), record["fingerprint"], dict(record["notes"]))
        if identity.fingerprint != (expected := fingerprint(identity.fields)):
            raise ValueError(f"fingerprint: expected {expected}, as its fields give, got {identity.fingerprint}")
    return identity


def check_identity(store: Store, fields: Mapping[str, Any]) -> None:
    """Raise IdentityError, with every field that differs, unless the cache was made for exactly these fields."""
    stored = read_identity(store)
    if stored.fingerprint != fingerprint(fields):
        differences = "; ".join(differing_fields(fields, stored.fields))
        raise IdentityError(
            f"cache {store.uri} has another identity: {differences}; choose another storage, or restore these values"
        )


def write_teacher(store: Store, description: TeacherDescription, spec: ShardSpec) -> None:
    """Create `teacher.json`. Every replica may call it; the first description is kept.

    Raises IdentityError where the stored teacher or capture spec differs. The engine's version may differ.
    """
    if not store.put_if_absent(layout.TEACHER_JSON, canonical_json(_teacher_record(description, spec)).encode()):
        _check_same_teacher(store, description, spec)


def read_teacher(store: Store) -> tuple[TeacherDescription, ShardSpec] | None:
    """Read `teacher.json`; None before any engine has started. Raises DamageError where it is invalid."""
    data = store.read_if_present(layout.TEACHER_JSON)
    if data is None:
        return None
    with damage_if_invalid(store.where(layout.TEACHER_JSON)):
        record = json.loads(data)
        teacher = TeacherDescription(**record["teacher"])
        return teacher, ShardSpec.of(parse_capture(record["capture"]), teacher)


def _teacher_record(description: TeacherDescription, spec: ShardSpec) -> dict[str, Any]:
    return {"teacher": asdict(description), "capture": asdict(spec.capture)}


def _check_same_teacher(store: Store, description: TeacherDescription, spec: ShardSpec) -> None:
    stored = read_teacher(store)
    if stored is None:
        raise DamageError(f"{store.where(layout.TEACHER_JSON)}: deleted while the cache was in use")
    records = [_teacher_record(description, spec), _teacher_record(*stored)]
    for record in records:
        record["teacher"] = {name: record["teacher"][name] for name in _TEACHER_IDENTITY}
    if differences := differing_fields(*records):
        raise IdentityError(
            f"cache {store.uri} holds signals of another teacher: {'; '.join(differences)}; choose another storage"
        )
