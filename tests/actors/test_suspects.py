import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.lease import Lease
from actors.suspects import CHANCES, Inquest


def ids(rows: int) -> list[str]:
    return [f"s{row}" for row in range(rows)]


def investigate(rows: int, poison: set[int], announced: str | None = None) -> tuple[Lease, int]:
    """Run an inquest against an engine that the poison rows kill; the lease it closed with, and the deaths it cost."""
    inquest, deaths = Inquest("u", ids(rows), announced), 1
    while True:
        lease = inquest.lease()
        skipped = {int(casualty.sequence_id[1:]) for casualty in lease.casualties}
        first, last = lease.rows or (0, rows)
        if poison & set(range(first, last)) - skipped:
            deaths += 1
            inquest.died("boom")
        elif inquest.survived():
            return lease, deaths


@given(st.integers(1, 33).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_every_poison_row_is_found_and_no_other_and_a_death_that_is_announced_costs_an_engine_less(case):
    rows, poison = case
    lease, deaths = investigate(rows, poison)
    assert {casualty.sequence_id for casualty in lease.casualties} == {f"s{row}" for row in poison}
    same, fewer = investigate(rows, poison, "boom")
    assert same == lease
    assert fewer == deaths - bool(poison)


@pytest.mark.parametrize("row", [0, 3, 7])
def test_one_poison_row_in_eight_costs_few_engines(row):
    _, deaths = investigate(8, {row})
    assert deaths <= 2 + 2 + CHANCES


def test_a_unit_that_died_once_by_accident_is_captured_whole():
    lease, deaths = investigate(8, set())
    assert lease == Lease("u")
    assert deaths == 1
    assert investigate(8, set(), "a neighbour took the memory") == (lease, deaths)


def test_the_last_engine_message_stays_with_the_row():
    lease, _ = investigate(4, {2})
    assert [(c.sequence_id, c.engine_message) for c in lease.casualties] == [("s2", "boom")]
    assert "alone" in lease.casualties[0].reason


def test_rows_that_kill_only_together_are_captured_one_by_one():
    inquest = Inquest("u", ids(4))
    while not (lease := inquest.lease()).one_by_one:
        if lease.rows is None or lease.rows == (0, 4):
            inquest.died("too much at once")
        else:
            inquest.survived()
    assert lease.casualties == ()
    assert inquest.survived()


def test_a_unit_that_dies_even_row_by_row_is_given_up_whole():
    inquest = Inquest("u", ids(3))
    for _ in range(40):
        lease = inquest.lease()
        if lease.rows is None and len(lease.casualties) < 3:
            inquest.died("hopeless")
        elif inquest.survived():
            break
    assert [casualty.sequence_id for casualty in lease.casualties] == ids(3)
