import pytest

from actors.losses import Losses
from actors.suspects import Inquest
from pipeline.errors import EngineError

ALIVE = {"n0", "n1"}


def losses(replicas=1, unit_rows=64, alive=ALIVE):
    return Losses("a", replicas, unit_rows, lambda: alive)


@pytest.mark.parametrize("replicas", [1, 12, 100])
def test_a_whole_crew_may_be_lost_at_once(replicas):
    crew = losses(replicas)
    for _ in range(replicas):
        crew.died("n0", "plug pulled")
        crew.did_not_open("n0", "plug pulled")


@pytest.mark.parametrize("unit_rows", [1, 2, 64, 100, 512])
def test_the_search_for_a_poison_row_is_within_the_bound(unit_rows):
    crew, inquest = losses(unit_rows=unit_rows), Inquest("u", [f"s{row}" for row in range(unit_rows)])
    crew.died("n0", "boom")
    while not (lease := inquest.lease()).casualties:
        first, last = lease.rows or (0, unit_rows)
        if first == 0 < last:
            crew.died("n0", "boom")
            inquest.died("boom")
        else:
            inquest.survived()


def test_an_engine_that_always_dies_ends_it_with_the_last_cause():
    crew = losses()
    with pytest.raises(EngineError, match=r"^teacher a: 12 engines in a row died.*the last: boom 11$"):
        for number in range(100):
            crew.died("n0", f"boom {number}")


def test_an_engine_that_never_opens_ends_it_with_the_last_cause():
    crew = losses()
    with pytest.raises(EngineError, match=r"^teacher a: 6 engines in a row did not open; the last: boom 5$"):
        for number in range(100):
            crew.did_not_open("", f"boom {number}")


def test_engines_that_went_with_their_machines_are_not_counted():
    alive = {"n0"}
    crew = losses(alive=alive)
    for number in range(1000):
        crew.died(f"preempted {number}", "gone")
        crew.did_not_open(f"preempted {number}", "gone")
    with pytest.raises(EngineError, match="12 engines in a row died"):
        for _ in range(12):
            crew.died("n0", "boom")


def test_work_that_is_done_makes_up_for_the_dead():
    crew = losses()
    for _ in range(100):
        crew.died("n0", "boom")
        crew.worked()
        crew.did_not_open("n0", "boom")
        crew.opened()


def test_a_machine_is_gone_once_the_cluster_says_so_and_no_place_is_no_machine():
    crew = losses()
    assert [crew.is_gone(node) for node in ("n0", "n7", "")] == [False, True, False]
