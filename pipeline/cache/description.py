"""Whose cache this is: the identity that preparation writes, and the teacher as its engine found it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from pipeline.cache.format.schema import ShardSpec
from pipeline.cache.storage import layout
from pipeline.cache.storage.store import Store
from pipeline.contracts import CaptureSpec, TargetMode, TeacherDescription
from pipeline.errors import DamageError, IdentityError, StorageError
from pipeline.identity import canonical_json, differing_fields, fingerprint

_DECISIVE = ("name", "architecture", "vocabulary", "layers", "hidden_width", "dtype", "engine")


@dataclass(frozen=True, slots=True)
class CacheIdentity:
    """Everything that changes a byte of a cache, its fingerprint, and what else preparation noted."""

    fields: Mapping[str, Any]
    fingerprint: str
    notes: Mapping[str, Any] = field(default_factory=dict)


def write_cache_identity(
    store: Store, fields: Mapping[str, Any], notes: Mapping[str, Any] = MappingProxyType({})
) -> CacheIdentity:
    """Claim the store for these fields by `cache.json`. Raises IdentityError where it is another's."""
    record = {"fingerprint": fingerprint(fields), "identity": dict(fields), "notes": dict(notes)}
    if not store.put_if_absent(layout.CACHE_JSON, (canonical_json(record) + "\n").encode()):
        check_identity(store, fields)
    return read_identity(store)


def read_identity(store: Store) -> CacheIdentity:
    """What `cache.json` says. Raises StorageError where the store is no cache, DamageError where it was changed."""
    data = store.read_if_present(layout.CACHE_JSON)
    if data is None:
        raise StorageError(f"{store.uri}: expected a cache, got a place without {layout.CACHE_JSON}")
    try:
        record = json.loads(data)
        identity = CacheIdentity(dict(record["identity"]), record["fingerprint"], dict(record["notes"]))
        if identity.fingerprint != fingerprint(identity.fields):
            raise ValueError("its fields do not give its fingerprint")
    except (ValueError, TypeError, KeyError) as error:
        raise DamageError(f"{store.where(layout.CACHE_JSON)}: not what was written: {error}") from error
    return identity


def check_identity(store: Store, fields: Mapping[str, Any]) -> None:
    """Nothing, if the cache is of exactly these fields; IdentityError with every field that differs otherwise."""
    stored = read_identity(store)
    if stored.fingerprint != fingerprint(fields):
        differences = "; ".join(differing_fields(fields, stored.fields))
        raise IdentityError(
            f"cache {store.uri} was made for something else: {differences}; "
            f"choose another storage, or put these values back"
        )


def write_teacher(store: Store, description: TeacherDescription, spec: ShardSpec) -> None:
    """Keep what the engine found in `teacher.json`. Any replica may call it; the first one's words stay.

    Raises IdentityError where the store has another teacher's, or a spec that decodes otherwise. A newer engine
    version may go on with an older one's cache.
    """
    if not store.put_if_absent(layout.TEACHER_JSON, canonical_json(_teacher_record(description, spec)).encode()):
        _refuse_other_teacher(store, description, spec)


def read_teacher(store: Store) -> tuple[TeacherDescription, ShardSpec] | None:
    """What `write_teacher` kept, or None before any engine has opened. Raises DamageError."""
    data = store.read_if_present(layout.TEACHER_JSON)
    if data is None:
        return None
    try:
        record = json.loads(data)
        teacher = TeacherDescription(**record["teacher"])
        return teacher, ShardSpec.of(_capture(record["capture"]), teacher)
    except (ValueError, TypeError, KeyError) as error:
        raise DamageError(f"{store.where(layout.TEACHER_JSON)}: not what was written: {error}") from error


def _teacher_record(description: TeacherDescription, spec: ShardSpec) -> dict[str, Any]:
    return {"teacher": asdict(description), "capture": asdict(spec.capture)}


def _capture(record: dict[str, Any]) -> CaptureSpec:
    """A capture spec from its JSON, where tuples are lists and the mode is a word."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
    }
    values["mode"] = TargetMode(values["mode"])
    return CaptureSpec(**values)


def _refuse_other_teacher(store: Store, description: TeacherDescription, spec: ShardSpec) -> None:
    stored = read_teacher(store)
    if stored is None:
        raise DamageError(f"{store.where(layout.TEACHER_JSON)}: there a moment ago, now gone")
    mine, theirs = _teacher_record(description, spec), _teacher_record(*stored)
    for record in (mine, theirs):
        record["teacher"] = {name: record["teacher"][name] for name in _DECISIVE}
    if differences := differing_fields(mine, theirs):
        raise IdentityError(f"cache {store.uri} holds another teacher's signals: {'; '.join(differences)}")
