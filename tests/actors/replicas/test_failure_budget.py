import pytest

from actors.replicas.failure_budget import FailureBudget
from actors.replicas.poison_rows import PoisonRowSearch
from actors.replicas.work import WorkItem
from pipeline.errors import EngineError

ALIVE = {"n0", "n1"}


def budget_of(replicas=1, unit_rows=64, alive=ALIVE):
    return FailureBudget("a", replicas, unit_rows, lambda: alive)


@pytest.mark.parametrize("replicas", [1, 12, 100])
def test_all_replicas_may_be_lost_at_once(replicas):
    budget = budget_of(replicas)
    for _ in range(replicas):
        budget.record_death("n0", "power failure")
        budget.record_failed_start("n0", "power failure")


@pytest.mark.parametrize("unit_rows", [1, 2, 64, 100, 512])
def test_the_search_for_a_poison_row_is_within_the_bound(unit_rows):
    budget = budget_of(unit_rows=unit_rows)
    search = PoisonRowSearch(WorkItem("u", "capture"), [f"s{row}" for row in range(unit_rows)])
    budget.record_death("n0", "boom")
    while not (item := search.next_item()).quarantined:
        first, last = item.rows or (0, unit_rows)
        if first == 0 < last:
            budget.record_death("n0", "boom")
            search.record_death("boom")
        else:
            search.record_success()


def test_an_engine_that_always_dies_ends_it_with_the_last_cause():
    budget = budget_of()
    with pytest.raises(EngineError, match=r"^teacher a: 12 engines in a row died.*the last: boom 11$"):
        for number in range(100):
            budget.record_death("n0", f"boom {number}")


def test_an_engine_that_never_opens_ends_it_with_the_last_cause():
    budget = budget_of()
    with pytest.raises(EngineError, match=r"^teacher a: 6 engines in a row did not open; the last: boom 5$"):
        for number in range(100):
            budget.record_failed_start("", f"boom {number}")


def test_engines_on_lost_nodes_are_not_counted():
    alive = {"n0"}
    budget = budget_of(alive=alive)
    for number in range(1000):
        budget.record_death(f"preempted {number}", "gone")
        budget.record_failed_start(f"preempted {number}", "gone")
    with pytest.raises(EngineError, match="12 engines in a row died"):
        for _ in range(12):
            budget.record_death("n0", "boom")


def test_a_completed_item_resets_the_budget():
    budget = budget_of()
    for _ in range(100):
        budget.record_death("n0", "boom")
        budget.record_success()
        budget.record_failed_start("n0", "boom")
        budget.record_start()


def test_a_node_is_lost_once_the_cluster_says_so_and_an_unscheduled_replica_has_no_node():
    budget = budget_of()
    assert [budget.is_lost(node) for node in ("n0", "n7", "")] == [False, True, False]
