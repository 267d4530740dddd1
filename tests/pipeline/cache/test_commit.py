"""One commit per unit under races, and a manifest that depends on the content alone."""

import json

import numpy as np
import pytest

from pipeline.cache.commit import commit_unit, committed_units, read_commit, read_commits
from pipeline.cache.description import write_cache_identity
from pipeline.cache.manifest import derive_manifest, read_manifest, write_manifest
from pipeline.cache.storage import layout
from pipeline.cache.storage.store import Store
from pipeline.contracts import ScoredSequence, Signals, TokenSequence
from pipeline.errors import DamageError, StorageError

UNIT = "train-00000"


def sequences(*names: str) -> list[ScoredSequence]:
    zeros_N, zeros_T = np.zeros(3, np.int32), np.zeros(2, np.float32)
    zero_ids_TK, zeros_TK = np.zeros((2, 1), np.int32), np.zeros((2, 1), np.float32)
    signals = Signals(zero_ids_TK, zeros_TK, zeros_T, zeros_T, zeros_T, zeros_TK)
    tokens = [TokenSequence(name, "d", None, "train", zeros_N, zeros_N.astype(np.uint8), zeros_N) for name in names]
    return [ScoredSequence(sequence, signals) for sequence in tokens]


@pytest.fixture
def store(tmp_path):
    store = Store.open(tmp_path)
    write_cache_identity(store, {"corpus": "c"})
    return store


def test_a_commit_names_the_shard_and_its_rows(store):
    commit = commit_unit(store, UNIT, b"shard", sequences("a", "b"), quarantined=["poison"])
    assert commit.won
    assert (commit.rows, commit.tokens, commit.first_sequence, commit.last_sequence) == (2, 6, "a", "b")
    assert store.read(commit.file) == b"shard"
    assert read_commit(store, UNIT) == commit
    assert commit.quarantined == ("poison",)


def test_a_repeated_attempt_is_committed_once(store):
    first = commit_unit(store, UNIT, b"shard", sequences("a"))
    assert commit_unit(store, UNIT, b"shard", sequences("a")) == first
    assert store.list("data") == [first.file]
    assert len(read_commits(store)) == 1


def test_a_later_attempt_with_other_bytes_changes_nothing(store):
    first = commit_unit(store, UNIT, b"shard", sequences("a"))
    later = commit_unit(store, UNIT, b"other", sequences("a"))
    assert not later.won
    assert later.file == first.file
    assert store.list("data") == [first.file]


def test_the_loser_of_a_race_deletes_its_own_file_only(store, monkeypatch):
    winner: list[object] = []

    def commit_first(point: str, unit_id: str) -> None:
        if point == "before_commit" and not winner:
            winner.append(None)
            winner[0] = commit_unit(store, UNIT, b"the winner's", sequences("a"))

    monkeypatch.setattr("pipeline.cache.storage.fault_points.fault_point", commit_first)
    loser = commit_unit(store, UNIT, b"the loser's", sequences("a"))
    assert not loser.won
    assert store.list("data") == [winner[0].file]
    assert store.read(loser.file) == b"the winner's"


def test_an_attempt_with_equal_bytes_keeps_the_committed_file(store, monkeypatch):
    reached: list[str] = []

    def commit_first(point: str, unit_id: str) -> None:
        if point == "before_commit" and not reached:
            reached.append(unit_id)
            commit_unit(store, UNIT, b"equal", sequences("a"))

    monkeypatch.setattr("pipeline.cache.storage.fault_points.fault_point", commit_first)
    loser = commit_unit(store, UNIT, b"equal", sequences("a"))
    assert loser.won
    assert store.read(loser.file) == b"equal"


def test_units_are_listed_by_number_not_by_name(store):
    units = ["train-100000", "held_out-00001", "train-00002", "train-99999"]
    for unit_id in units:
        commit_unit(store, unit_id, unit_id.encode(), sequences(unit_id))
    assert committed_units(store) == ["train-00002", "train-99999", "train-100000", "held_out-00001"]
    assert [commit.unit_id for commit in read_commits(store)] == committed_units(store)


def test_manifests_of_equal_content_are_equal_bytes(tmp_path):
    manifests = []
    for order in ([0, 1, 2], [2, 0, 1]):
        store = Store.open(tmp_path / str(order[0]))
        write_cache_identity(store, {"corpus": "c"})
        for number in order:
            commit_unit(store, layout.format_unit_id("train", number), b"%d" % number, sequences(f"s{number}"))
            commit_unit(store, layout.format_unit_id("train", number), b"other", sequences(f"s{number}"))
        write_manifest(store)
        write_manifest(store)
        manifests.append(store.read("manifest.json"))
    assert manifests[0] == manifests[1]
    assert json.loads(manifests[0])["rows"] == 3


def test_a_manifest_older_than_the_commits_is_rewritten(store, monkeypatch):
    """Another writer commits and writes its manifest after this one has derived its own and before it writes it."""
    commit_unit(store, UNIT, b"shard", sequences("a"))
    reached: list[str] = []

    def commit_first(point: str, unit_id: str) -> None:
        if point == "before_manifest" and not reached:
            reached.append(point)
            commit_unit(store, "train-00001", b"later", sequences("b"))
            write_manifest(store)

    monkeypatch.setattr("pipeline.cache.storage.fault_points.fault_point", commit_first)
    assert write_manifest(store) == read_manifest(store) == derive_manifest(store)
    assert list(read_manifest(store).by_unit) == [UNIT, "train-00001"]


def test_a_manifest_reads_as_written_and_sums_its_commits(store):
    assert read_manifest(store) is None
    commit_unit(store, UNIT, b"shard", sequences("a", "b"), quarantined=["poison"])
    commit_unit(store, "held_out-00000", b"", [])
    assert write_manifest(store) == read_manifest(store) == derive_manifest(store)
    manifest = derive_manifest(store)
    assert (manifest.rows, manifest.tokens, manifest.bytes, manifest.quarantined) == (2, 6, 5, ("poison",))
    assert manifest.unit_ids("held_out") == ["held_out-00000"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d[:-9],
        lambda d: d.replace(b'"rows":2', b'"rows":3', 1),
        lambda d: d.replace(b'"beside":{}', b'"beside":{"teacher.json":"0"}'),
        lambda d: b"[]",
    ],
)
def test_a_changed_manifest_is_damage(store, damage):
    commit_unit(store, UNIT, b"shard", sequences("a", "b"))
    write_manifest(store)
    store.put("manifest.json", damage(store.read("manifest.json")))
    with pytest.raises(DamageError, match=r"manifest\.json: invalid content"):
        read_manifest(store)


@pytest.mark.parametrize(
    "damage", [lambda d: b"", lambda d: d.replace(b"train-00000", b"train-00001"), lambda d: b"{}"]
)
def test_a_changed_commit_is_damage(store, damage):
    commit_unit(store, UNIT, b"shard", sequences("a"))
    path = layout.commit_path(UNIT)
    store.put(path, damage(store.read(path)))
    with pytest.raises(DamageError, match=r"train-00000\.json: invalid content"):
        read_commits(store)


@pytest.mark.parametrize("unit_id", ["../train-00000", "train", "train-00000/x", "other-00000"])
def test_an_invalid_unit_id_is_refused(store, unit_id):
    with pytest.raises(StorageError):
        commit_unit(store, unit_id, b"shard", sequences("a"))
    assert store.list("data") == []
