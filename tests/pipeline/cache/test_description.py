"""A cache belongs to one identity and one teacher."""

import dataclasses

import pytest

from pipeline.cache.description import (
    check_identity,
    read_identity,
    read_teacher,
    write_cache_identity,
    write_teacher,
)
from pipeline.cache.format.schema import ShardSpec
from pipeline.cache.storage.store import Store
from pipeline.contracts import CaptureSpec, TargetMode, TeacherDescription
from pipeline.errors import DamageError, IdentityError, StorageError

FIELDS = {"corpus": {"source": "python-docs", "max_tokens": 10}, "capture": {"k": 64, "temperatures": (1.0, 2.0)}}
TEACHER = TeacherDescription("t", "Llama", 49152, 30, 576, "bfloat16", "vllm", "0.32.0", {"a": [1]})
CAPTURE = CaptureSpec(TargetMode.TOPP, k=8, temperatures=(1.0, 2.0), hidden_layers=(3, -1))


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path)


def test_the_same_identity_is_accepted_again(store):
    first = write_cache_identity(store, FIELDS)
    assert write_cache_identity(store, FIELDS) == first
    assert read_identity(store).fingerprint == first.fingerprint
    check_identity(store, FIELDS)


def test_another_identity_is_refused_field_by_field(store):
    write_cache_identity(store, FIELDS)
    other = {**FIELDS, "capture": {"k": 32, "temperatures": (1.0, 2.0)}}
    with pytest.raises(IdentityError, match=r"capture\.k: got 32, expected 64; choose another storage"):
        write_cache_identity(store, other)
    with pytest.raises(IdentityError) as caught:
        check_identity(store, other)
    assert "corpus" not in str(caught.value)


def test_a_store_without_cache_json_is_refused(store):
    with pytest.raises(StorageError, match=r"expected a cache, found no cache\.json"):
        read_identity(store)


def test_an_edited_identity_is_damage(store):
    write_cache_identity(store, FIELDS)
    store.put("cache.json", store.read("cache.json").replace(b'"k":64', b'"k":65'))
    with pytest.raises(DamageError, match="as its fields give, got"):
        read_identity(store)


def test_the_first_teacher_is_kept_and_the_engine_version_may_change(store):
    spec = ShardSpec.of(CAPTURE, TEACHER)
    assert read_teacher(store) is None
    write_teacher(store, TEACHER, spec)
    write_teacher(store, dataclasses.replace(TEACHER, engine_version="0.33.0"), spec)
    assert read_teacher(store) == (TEACHER, spec)


def test_another_teacher_is_refused(store):
    write_teacher(store, TEACHER, ShardSpec.of(CAPTURE, TEACHER))
    wider = dataclasses.replace(TEACHER, vocabulary=50000)
    with pytest.raises(IdentityError, match=r"teacher\.vocabulary: got 50000, expected 49152"):
        write_teacher(store, wider, ShardSpec.of(CAPTURE, wider))
