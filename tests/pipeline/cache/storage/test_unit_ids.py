import pytest

from pipeline.cache.storage.store import Store
from pipeline.cache.storage.unit_ids import UnitIds
from pipeline.cache.unit_list import UNITS_PER_FILE, UnitList, write_units


def test_unit_ids_equal_those_of_the_unit_list(made_up, tmp_path):
    made, store = made_up(), Store.open(tmp_path)
    write_units(store, [made.unit(0), made.unit(0, split="held_out"), made.unit(1), made.unit(2)])
    ids = UnitIds.read(store)
    assert list(ids) == UnitList.open(store).unit_ids() == [*(f"train-0000{n}" for n in range(3)), "held_out-00000"]
    assert ids == UnitIds(train=3, held_out=1)


def test_place_is_the_inverse_of_indexing():
    ids = UnitIds(train=3, held_out=2)
    assert [ids.index_of(unit_id) for unit_id in ids] == list(range(5))
    assert ids[-1] == ids[1:][-1] == "held_out-00001"
    assert ids.index_of("train-00003") is ids.index_of("held_out-00002") is None
    with pytest.raises(IndexError):
        ids[5]


def test_all_row_groups_of_an_index_are_read(made_up, tmp_path):
    made, store = made_up(), Store.open(tmp_path)
    units = [made.unit(number, sequences=1, split=split) for number in range(400) for split in ("train", "held_out")]
    assert len(units) > UNITS_PER_FILE
    write_units(store, units)
    plan = UnitList.open(store)
    assert plan.unit_ids() == list(UnitIds.read(store)) == list(UnitIds(train=400, held_out=400))
    assert plan.read("held_out-00399").sequences[0].sequence_id == units[-1].sequences[0].sequence_id
    assert plan.n_tokens("held_out-00399").tolist() == [len(units[-1].sequences[0].input_ids_N)]
