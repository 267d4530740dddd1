"""The unit list reads as written, has lengths in its index, and needs constant memory."""

import tracemalloc

import numpy as np
import pytest

from pipeline.cache import unit_list as unit_list_module
from pipeline.cache.commit import row_set_digest
from pipeline.cache.storage.store import Store
from pipeline.cache.unit_list import UnitList, write_units
from pipeline.contracts import Unit
from pipeline.errors import DamageError, StorageError


def as_lists(unit: Unit) -> tuple[object, ...]:
    fields = [getattr(sequence, name) for sequence in unit.sequences for name in sequence.__slots__]
    values = [value.tolist() if isinstance(value, np.ndarray) else value for value in fields]
    return unit.unit_id, unit.split, values


def same(left: Unit, right: Unit) -> bool:
    return as_lists(left) == as_lists(right)


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path)


def test_units_read_as_written(store, made_up, monkeypatch):
    monkeypatch.setattr(unit_list_module, "UNITS_PER_FILE", 3)
    made = made_up()
    units = [made.unit(n, split=split) for n in range(4) for split in ("held_out", "train")]
    write_units(store, units)
    unit_list = UnitList.open(store)
    assert store.list("units") == [
        "units/00000.parquet",
        "units/00001.parquet",
        "units/00002.parquet",
        "units/index.parquet",
    ]
    assert unit_list.unit_ids() == unit_list.unit_ids("train") + unit_list.unit_ids("held_out")
    assert unit_list.unit_ids("train") == ["train-00000", "train-00001", "train-00002", "train-00003"]
    assert len(unit_list) == 8
    for unit in units:
        assert same(unit_list.read(unit.unit_id), unit)


def test_lengths_labels_and_digests_are_read_from_the_index(store, made_up):
    made = made_up()
    units = [made.unit(n) for n in range(3)]
    write_units(store, units)
    store.delete("units/00000.parquet")
    unit_list = UnitList.open(store)
    for unit in units:
        sequences = unit.sequences
        assert unit_list.n_tokens(unit.unit_id).tolist() == [len(s.input_ids_N) for s in sequences]
        assert unit_list.n_labels(unit.unit_id).tolist() == [int(s.loss_mask_N[1:].sum()) for s in sequences]
        assert unit_list.sequences_sha256(unit.unit_id) == row_set_digest(s.sequence_id for s in sequences)
    assert unit_list.tokens("train") == sum(len(s.input_ids_N) for unit in units for s in unit.sequences)
    assert unit_list.tokens("held_out") == 0


def test_writing_again_gives_the_same_bytes(tmp_path, made_up):
    made = made_up()
    stores = [Store.open(tmp_path / name) for name in "ab"]
    for store in stores:
        write_units(store, (made.unit(n) for n in range(5)))
    for path in stores[0].list():
        assert stores[0].read(path) == stores[1].read(path)


def test_an_unfinished_list_is_not_read(store, made_up, monkeypatch):
    monkeypatch.setattr(unit_list_module, "UNITS_PER_FILE", 1)
    made = made_up()

    def interrupted_units():
        yield made.unit(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_units(store, interrupted_units())
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
    with pytest.raises(DamageError, match="expected unit 'train-00007', found none"):
        UnitList.open(store).read("train-00007")
    with pytest.raises(StorageError, match="expected the id of a held_out unit"):
        write_units(store, [Unit("train-00000", "held_out", ())])


def test_memory_does_not_grow_with_the_number_of_units(store, made_up, monkeypatch):
    monkeypatch.setattr(unit_list_module, "UNITS_PER_FILE", 16)
    made = made_up()
    peaks = []
    for count in (64, 640):
        tracemalloc.start()
        write_units(store, (made.unit(n) for n in range(count)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 3 * peaks[0] + 576 * 1024, f"ten times the units took {peaks} bytes at most"
