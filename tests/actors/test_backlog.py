import numpy as np
import pytest

from actors.backlog import Backlog, pending_places
from pipeline.cache.storage.store import Store
from pipeline.cache.storage.unit_ids import UnitIds

IDS = UnitIds(train=3, held_out=2)


def test_units_go_out_in_order_and_those_that_come_back_go_first():
    backlog = Backlog(IDS, np.array([1, 2, 4], np.int32))
    assert [backlog.take(), len(backlog)] == ["train-00001", 2]
    backlog.give_back("train-00001")
    assert len(backlog) == 3
    assert [backlog.take() for _ in range(3)] == ["train-00001", "train-00002", "held_out-00001"]
    assert len(backlog) == 0
    with pytest.raises(IndexError):
        backlog.take()


def test_what_is_committed_is_not_pending_and_what_is_not_planned_does_not_count(tmp_path):
    store = Store.open(tmp_path)
    for unit_id in ("train-00001", "held_out-00000", "held_out-00007"):
        store.put(f"commits/{unit_id}.json", b"{}")
    assert pending_places(store, IDS).tolist() == [0, 2, 4]
