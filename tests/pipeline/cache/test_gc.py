"""gc deletes old files that no commit names, and nothing else."""

import json
import os
import time
from dataclasses import asdict

import pytest

from pipeline.cache.commit import commit_unit
from pipeline.cache.description import write_cache_identity
from pipeline.cache.format.shard_writer import encode_shard
from pipeline.cache.gc import collect_garbage
from pipeline.cache.manifest import write_manifest
from pipeline.cache.storage.store import Store
from pipeline.errors import DamageError, StorageError, UsageError

ORPHANS = ["data/train-00000-0123456789abcdef.parquet", "data/train-00007-0123456789abcdef.parquet", "data/odd"]


@pytest.fixture
def store(tmp_path, made_up):
    store, made = Store.open(tmp_path), made_up()
    write_cache_identity(store, {"of": "made-up"})
    for number in range(2):
        rows = made.rows(made.unit(number))
        commit_unit(store, f"train-{number:05d}", encode_shard(rows, made.spec), rows)
    write_manifest(store)
    for path in ORPHANS:
        store.put(path, b"orphan")
    (tmp_path / "commits" / ".tmp-0123").write_bytes(b"unfinished")
    return store


def set_age(store: Store, hours: float) -> None:
    for path in [*store.list(), *store.temporary_files()]:
        os.utime(store.local_path() / path, (time.time() - 3600 * hours,) * 2)


def test_old_orphans_and_unfinished_files_are_deleted_and_the_rest_is_kept(store):
    set_age(store, hours=25)
    kept = {path: store.read(path) for path in store.list() if path not in ORPHANS}
    report = collect_garbage(store.uri)
    assert sorted(report.removed) == sorted([*ORPHANS, "commits/.tmp-0123"])
    assert report.removed_bytes == 3 * len(b"orphan") + len(b"unfinished")
    assert {path: store.read(path) for path in store.list()} == kept
    assert store.temporary_files() == []
    again = collect_garbage(store.uri)
    assert again.removed == ()
    assert str(again) == "nothing to remove: every shard has a commit, and there are no unfinished writes"


def test_files_younger_than_the_grace_period_are_kept(store):
    set_age(store, hours=23)
    report = collect_garbage(store)
    assert report.removed == ()
    assert sorted(report.too_young) == sorted([*ORPHANS, "commits/.tmp-0123"])
    assert set(ORPHANS) < set(store.list())
    assert str(report).startswith("nothing to remove yet; 4 files that no commit names are younger")
    assert len(collect_garbage(store, grace_s=60.0).removed) == 4


def test_a_dry_run_lists_and_deletes_nothing(store):
    set_age(store, hours=25)
    report = collect_garbage(store, dry_run=True)
    assert len(report.removed) == 4
    assert set(ORPHANS) < set(store.list())
    assert "would remove data/odd" in str(report)
    assert json.loads(json.dumps(asdict(report)))["dry_run"] is True


def test_nothing_is_deleted_while_a_commit_is_invalid(store):
    set_age(store, hours=25)
    store.put("commits/train-00001.json", b"{")
    with pytest.raises(DamageError):
        collect_garbage(store)
    assert set(ORPHANS) < set(store.list())


def test_a_store_that_is_no_cache_is_refused(tmp_path):
    store = Store.open(tmp_path)
    store.put("data/precious.parquet", b"x")
    with pytest.raises(StorageError, match="expected a cache"):
        collect_garbage(store, grace_s=0.0)
    assert store.exists("data/precious.parquet")


@pytest.mark.parametrize("grace_s", [-1.0, float("nan")])
def test_an_invalid_grace_period_is_refused(store, grace_s):
    with pytest.raises(UsageError, match="expected 0 or more seconds"):
        collect_garbage(store, grace_s=grace_s)


def test_a_file_written_again_during_gc_is_kept(store, monkeypatch):
    """An attempt crashes, a day passes, and an equal attempt writes the same name while gc runs."""
    set_age(store, hours=25)
    size = Store.size

    def write_again(self: Store, path: str) -> int:
        if path == ORPHANS[1]:
            self.put(path, b"orphan")
        return size(self, path)

    monkeypatch.setattr(Store, "size", write_again)
    assert ORPHANS[1] not in collect_garbage(store).removed
    assert store.exists(ORPHANS[1])
    assert not store.exists(ORPHANS[0])


def test_a_file_that_its_writer_deletes_during_gc_is_no_error(store, monkeypatch):
    set_age(store, hours=25)
    modified_s = Store.modified_s

    def delete_first(self: Store, path: str) -> float:
        self.delete("commits/.tmp-0123")
        return modified_s(self, path)

    monkeypatch.setattr(Store, "modified_s", delete_first)
    assert sorted(collect_garbage(store).removed) == sorted(ORPHANS)
