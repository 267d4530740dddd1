"""The unit list gives back what was cut, knows lengths without reading, and is flat in memory."""

import tracemalloc

import numpy as np
import pytest

from pipeline.cache import unit_list as units_room
from pipeline.cache.commit import row_set_digest
from pipeline.cache.storage.store import Store
from pipeline.cache.unit_list import UnitList, write_units
from pipeline.contracts import Unit
from pipeline.errors import DamageError, StorageError


def plain(unit: Unit) -> tuple[object, ...]:
    fields = [getattr(one, name) for one in unit.sequences for name in one.__slots__]
    values = [value.tolist() if isinstance(value, np.ndarray) else value for value in fields]
    return unit.unit_id, unit.split, values


def same(left: Unit, right: Unit) -> bool:
    return plain(left) == plain(right)


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path)


def test_units_are_read_as_they_were_cut(store, made_up, monkeypatch):
    monkeypatch.setattr(units_room, "UNITS_PER_FILE", 3)
    made = made_up()
    cut = [made.unit(n, split=split) for n in range(4) for split in ("held_out", "train")]
    write_units(store, cut)
    plan = UnitList.open(store)
    assert store.list("units") == [
        "units/00000.parquet",
        "units/00001.parquet",
        "units/00002.parquet",
        "units/index.parquet",
    ]
    assert plan.unit_ids() == plan.unit_ids("train") + plan.unit_ids("held_out")
    assert plan.unit_ids("train") == ["train-00000", "train-00001", "train-00002", "train-00003"]
    assert len(plan) == 8
    for unit in cut:
        assert same(plan.read(unit.unit_id), unit)


def test_lengths_labels_and_digests_are_known_without_reading(store, made_up):
    made = made_up()
    cut = [made.unit(n) for n in range(3)]
    write_units(store, cut)
    store.delete("units/00000.parquet")
    plan = UnitList.open(store)
    for unit in cut:
        assert plan.n_tokens(unit.unit_id).tolist() == [len(one.input_ids_N) for one in unit.sequences]
        assert plan.n_labels(unit.unit_id).tolist() == [int(one.loss_mask_N[1:].sum()) for one in unit.sequences]
        assert plan.sequences_sha256(unit.unit_id) == row_set_digest(one.sequence_id for one in unit.sequences)
    assert plan.tokens("train") == sum(len(one.input_ids_N) for unit in cut for one in unit.sequences)
    assert plan.tokens("held_out") == 0


def test_writing_again_gives_the_same_bytes(tmp_path, made_up):
    made = made_up()
    stores = [Store.open(tmp_path / name) for name in "ab"]
    for store in stores:
        write_units(store, (made.unit(n) for n in range(5)))
    for path in stores[0].list():
        assert stores[0].read(path) == stores[1].read(path)


def test_a_list_that_was_not_finished_is_none(store, made_up, monkeypatch):
    monkeypatch.setattr(units_room, "UNITS_PER_FILE", 1)
    made = made_up()

    def breaking_off():
        yield made.unit(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_units(store, breaking_off())
    assert store.list() == ["units/00000.parquet"]
    with pytest.raises(StorageError, match="expected a prepared cache"):
        UnitList.open(store)
    write_units(store, [made.unit(1)])
    assert same(UnitList.open(store).read("train-00001"), made.unit(1))


@pytest.mark.parametrize("damage", [lambda d: d[:-3], lambda d: d[:200] + bytes([d[200] ^ 1]) + d[201:]])
@pytest.mark.parametrize("path", ["units/00000.parquet", "units/index.parquet"])
def test_a_damaged_list_is_refused(store, made_up, damage, path):
    write_units(store, [made_up().unit(n) for n in range(20)])
    store.put(path, damage(store.read(path)))
    with pytest.raises(DamageError, match=path):
        UnitList.open(store).read("train-00000")


def test_an_unknown_unit_and_a_wrong_split_are_refused(store, made_up):
    write_units(store, [made_up().unit(0)])
    with pytest.raises(DamageError, match="expected unit 'train-00007', got none"):
        UnitList.open(store).read("train-00007")
    with pytest.raises(StorageError, match="expected the id of a held_out unit"):
        write_units(store, [Unit("train-00000", "held_out", ())])


def test_memory_does_not_grow_with_the_corpus(store, made_up, monkeypatch):
    monkeypatch.setattr(units_room, "UNITS_PER_FILE", 16)
    made = made_up()
    peaks = []
    for count in (64, 640):
        tracemalloc.start()
        write_units(store, (made.unit(n) for n in range(count)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 3 * peaks[0] + 576 * 1024, f"ten times the units took {peaks} bytes at most"
