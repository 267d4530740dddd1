import numpy as np
import pytest

from actors.capture import pending_positions
from actors.replicas.work import WorkItem, WorkQueue
from pipeline.cache.storage.store import Store
from pipeline.cache.storage.unit_ids import UnitIds

IDS = UnitIds(train=3, held_out=2)


def test_units_are_taken_in_order_and_those_that_are_put_back_first():
    queue = WorkQueue(IDS, np.array([1, 2, 4], np.int32))
    first = queue.pop()
    assert [first, len(queue)] == [WorkItem("train-00001", "capture"), 2]
    queue.put_back(first)
    assert len(queue) == 3
    assert [queue.pop().item_id for _ in range(3)] == ["train-00001", "train-00002", "held_out-00001"]
    assert len(queue) == 0
    with pytest.raises(IndexError):
        queue.pop()


def test_appended_items_come_last_unless_they_are_put_back():
    queue, check = WorkQueue(IDS, np.array([0], np.int32)), WorkItem("train-00000", "check")
    queue.append(check)
    assert [len(queue), queue.pop().method, queue.pop()] == [2, "capture", check]
    queue.append(WorkItem("train-00001", "check"))
    queue.put_back(check)
    assert [queue.pop(), queue.pop().item_id, len(queue)] == [check, "train-00001", 0]


def test_committed_units_are_not_pending_and_commits_of_other_units_are_ignored(tmp_path):
    store = Store.open(tmp_path)
    for unit_id in ("train-00001", "held_out-00000", "held_out-00007"):
        store.put(f"commits/{unit_id}.json", b"{}")
    assert pending_positions(store, IDS).tolist() == [0, 2, 4]
