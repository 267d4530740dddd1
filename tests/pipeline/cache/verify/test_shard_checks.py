import json
import random
from dataclasses import replace

import numpy as np
import pytest

from pipeline.cache.commit import read_commit
from pipeline.cache.description import read_teacher
from pipeline.cache.format.codecs import encode_sequence
from pipeline.cache.format.parquet import ShardDamage
from pipeline.cache.manifest import write_manifest
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage import layout
from pipeline.cache.unit_list import UnitList
from pipeline.cache.verify.shard_checks import ShardCheck
from pipeline.cache.verify.verify_cache import verify_cache


def problems(store):
    return [finding for finding in verify_cache(store).findings if finding.severity != "note"]


def shard_of(store, unit_id="train-00000"):
    return read_commit(store, unit_id).file


@pytest.fixture
def small_shard(make_cache):
    """(check, data): a function from bytes to findings, and the bytes of a shard without damage."""
    store = make_cache(documents=2, k=4, hidden_layers=[-1])
    commit = read_commit(store, "train-00000")
    unit_list = UnitList.open(store)
    spec = read_teacher(store)[1]

    def check(data):
        planned = unit_list.read("train-00000").sequences
        ids = frozenset(sequence.sequence_id for sequence in planned)
        return list(
            ShardCheck(
                commit, commit.fingerprint, spec, planned, lambda: ids, {commit.sha256: "train-00000"}, True
            ).findings(data)
        )

    return check, store.read(commit.file)


def test_truncation_at_any_length_is_reported(small_shard):
    check, data = small_shard
    for length in [0, 1, 4, 8, *range(12, len(data), len(data) // 60), len(data) - 1]:
        assert "truncated" in {finding.kind for finding in check(data[:length])}, length
    assert "sha256" in {finding.kind for finding in check(data + b"x")}


@pytest.mark.slow
def test_a_bit_flipped_in_each_of_1000_shard_copies_is_found_1000_times(small_shard, record_property):
    check, data = small_shard
    assert check(data) == []
    random_bits = random.Random(0)
    detected = placed = 0
    for _ in range(1000):
        position, bit = random_bits.randrange(len(data)), random_bits.randrange(8)
        copy = bytearray(data)
        copy[position] ^= 1 << bit
        findings = check(bytes(copy))
        detected += any(finding.kind == "sha256" for finding in findings)
        placed += any(finding.row_group is not None for finding in findings)
    record_property("measured", f"{detected} of 1000 flips found, {placed} of them placed in a row group")
    assert detected == 1000
    assert placed > 300


def altered(**fields):
    """A change of rows: the second row's signals get other fields."""

    def change(rows):
        signals = rows[1].signals
        wrong = {name: edit(getattr(signals, name).copy()) for name, edit in fields.items()}
        return [rows[0], replace(rows[1], signals=replace(signals, **wrong)), *rows[2:]]

    return change


def at(index, value):
    def edit(array):
        array[index] = value
        return array

    return edit


@pytest.fixture
def unchecked_encoder(monkeypatch):
    """Switch off the encoder's own check of masses."""
    monkeypatch.setattr("pipeline.cache.format.codecs.signals.check_mass", lambda *_: None)


@pytest.mark.parametrize("mode", ["topk", "topp", "unbiased"])
@pytest.mark.parametrize("change", [lambda w: w * 0, lambda w: w - 5], ids=["all 0", "5 nats down"])
def test_weights_that_do_not_sum_to_1_with_the_tail_are_reported(make_cache, unchecked_encoder, mode, change):
    def changed(weight_TK):
        return np.where(np.isfinite(weight_TK), change(weight_TK), -np.inf)

    store = make_cache(change=altered(entry_logweight_TK=changed), units=["train-00000"], mode=mode)
    values = [f for f in problems(store) if f.kind != "uncommitted"]
    assert {(f.kind, f.shard, f.row_group, f.row) for f in values} == {("invariant", shard_of(store), 0, 1)}
    assert "mass of stored entry weights: expected 1 minus the tail's, got" in values[0].message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_logprob_T": at(3, np.nan)}, "position 3: label log-prob"),
        ({"label_logprob_T": at(2, 0.5)}, "position 2: label log-prob: expected a finite value up to 0, got 0.5"),
        ({"label_logprob_T": at(2, -np.inf)}, "position 2: label log-prob"),
        ({"entropy_T": at(0, -1.0)}, "position 0: entropy: expected 0..log V, got -1"),
        ({"entropy_T": at(0, 7.0)}, "position 0: entropy: expected 0..log V, got 7"),
        ({"tail_logmass_T": at(4, 0.25)}, "position 4: tail log-mass: expected at most 0"),
        ({"tail_logmass_T": at(4, np.nan)}, "position 4: tail log-mass"),
        ({"log_partition_TC": at((5, 1), np.inf)}, "position 5: log-partition"),
        ({"hidden_TLD": at((6, 0, 3), 0x7F80)}, "position 6: hidden states: expected finite values"),
        ({"entry_id_TK": at((7, 0), 600)}, "position 7: entry ids: expected 0..511"),
    ],
)
def test_violated_invariants_are_reported_with_row_group_and_row(make_cache, unchecked_encoder, fields, message):
    store = make_cache(
        change=altered(**fields),
        units=["train-00000"],
        row_group_per_row=True,
        hidden_layers=[-1],
        temperatures=[1.0, 2.0],
    )
    values = [f for f in problems(store) if f.kind != "uncommitted"]
    assert values
    assert {(f.kind, f.shard, f.row_group, f.row) for f in values} == {("invariant", shard_of(store), 1, 1)}
    assert message in " ".join(f.message for f in values)


def test_rows_that_are_missing_duplicated_or_out_of_order_are_reported(make_cache):
    cases = {
        "1 rows missing, such as": lambda rows: rows[1:],
        "1 rows duplicated, such as": lambda rows: [rows[0], *rows],
        "not in the order of the unit list": lambda rows: rows[::-1],
    }
    for number, (message, change) in enumerate(cases.items()):
        store = make_cache(f"run{number}", change=change, units=["train-00000"])
        rows = [f for f in problems(store) if f.kind == "rows"]
        assert len(rows) == 1
        assert message in rows[0].message


def test_rows_with_other_tokens_than_the_unit_list_are_reported(make_cache):
    def change(rows):
        ids_N = rows[0].sequence.input_ids_N.copy()
        ids_N[2] += 1
        return [replace(rows[0], sequence=replace(rows[0].sequence, input_ids_N=ids_N)), *rows[1:]]

    store = make_cache(change=change, units=["train-00000"])
    tokens = [f for f in problems(store) if f.kind == "tokens"]
    assert [(f.row_group, f.row) for f in tokens] == [(0, 0)]
    assert "input_ids_N: differs from the unit list" in tokens[0].message


def test_a_digest_that_does_not_match_the_ids_is_reported(make_cache, monkeypatch):
    def encode(sequence):
        return {**encode_sequence(sequence), "input_digest": "0" * 64}

    monkeypatch.setattr("pipeline.cache.format.shard_writer.encode_sequence", encode)
    store = make_cache(fresh=True, units=["train-00000"])
    tokens = [f for f in problems(store) if f.kind == "tokens"]
    assert len(tokens) == 4
    assert all("input_ids: expected digest 0000" in f.message for f in tokens)


def test_a_shard_and_its_commit_of_another_teacher_are_foreign(make_cache):
    store, other = make_cache(), make_cache("other", options={"seed": 5})
    commit = read_commit(other, "train-00000")
    store.delete(shard_of(store))
    store.put(commit.file, other.read(commit.file))
    store.put(layout.commit_path("train-00000"), other.read(layout.commit_path("train-00000")))
    for manifest in (write_manifest, lambda store: store.delete(layout.MANIFEST_JSON)):
        manifest(store)
        (foreign,) = (f for f in problems(store) if f.kind == "foreign")
        assert (foreign.shard, foreign.severity) == (commit.file, "damage")
        assert f"commit was written for the cache with fingerprint {commit.fingerprint}, expected" in foreign.message
        with pytest.raises(ShardDamage, match=f"got one of cache {commit.fingerprint}"):
            CacheReader.open(store).read_unit("train-00000")


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("rows", 5),
        ("tokens", 1),
        ("bytes", 1),
        ("first_sequence", "other"),
        ("last_sequence", None),
        ("sequences_sha256", "0" * 64),
        ("quarantined", ["other"]),
    ],
)
def test_a_commit_that_disagrees_with_its_shard_is_reported(make_cache, field, wrong):
    store = make_cache()
    path = layout.commit_path("train-00000")
    record = json.loads(store.read(path))
    store.put(path, json.dumps(record | {field: wrong}).encode())
    write_manifest(store)
    (finding,) = problems(store) if field != "quarantined" else [f for f in problems(store) if f.kind == "commit"]
    assert (finding.kind, finding.shard) == ("commit", record["file"])
    got = json.dumps(wrong, separators=(",", ":"))
    assert f"shard and commit disagree: commit field {field}: got {got}, expected " in finding.message
