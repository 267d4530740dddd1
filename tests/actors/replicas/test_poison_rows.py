import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.replicas.poison_rows import ATTEMPTS, PoisonRowSearch, PoisonRowSearches
from actors.replicas.work import WorkItem

UNIT = WorkItem("u", "capture")


def ids(rows: int) -> list[str]:
    return [f"s{row}" for row in range(rows)]


def search_in(rows: int, poison: set[int], reported: str | None = None) -> tuple[WorkItem, int]:
    """Search with an engine that the poison rows kill; the item that the search ended with, and the deaths it took."""
    search, deaths = PoisonRowSearch(UNIT, ids(rows), reported), 1
    while True:
        item = search.next_item()
        skipped = {int(row.sequence_id[1:]) for row in item.quarantined}
        first, last = item.rows or (0, rows)
        if poison & set(range(first, last)) - skipped:
            deaths += 1
            search.record_death("boom")
        elif search.record_success():
            return item, deaths


@given(st.integers(1, 33).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_every_poison_row_is_found_and_no_other_and_a_reported_death_costs_an_engine_less(case):
    rows, poison = case
    item, deaths = search_in(rows, poison)
    assert {row.sequence_id for row in item.quarantined} == {f"s{row}" for row in poison}
    same, fewer = search_in(rows, poison, "boom")
    assert same == item
    assert fewer == deaths - bool(poison)


@pytest.mark.parametrize("row", [0, 3, 7])
def test_one_poison_row_in_eight_costs_few_engines(row):
    _, deaths = search_in(8, {row})
    assert deaths <= 2 + 2 + ATTEMPTS


def test_a_unit_that_died_once_by_accident_is_captured_whole():
    item, deaths = search_in(8, set())
    assert item == UNIT
    assert deaths == 1
    assert search_in(8, set(), "out of memory") == (item, deaths)


def test_the_last_engine_message_stays_with_the_row():
    item, _ = search_in(4, {2})
    assert [(row.sequence_id, row.engine_message) for row in item.quarantined] == [("s2", "boom")]
    assert "alone" in item.quarantined[0].reason


def test_rows_that_kill_only_together_are_captured_one_by_one():
    search = PoisonRowSearch(UNIT, ids(4))
    while not (item := search.next_item()).one_by_one:
        if item.rows is None or item.rows == (0, 4):
            search.record_death("too much at once")
        else:
            search.record_success()
    assert item.quarantined == ()
    assert search.record_success()


def test_a_unit_that_dies_even_row_by_row_is_quarantined_whole():
    search = PoisonRowSearch(UNIT, ids(3))
    for _ in range(40):
        item = search.next_item()
        if item.rows is None and len(item.quarantined) < 3:
            search.record_death("hopeless")
        elif search.record_success():
            break
    assert [row.sequence_id for row in item.quarantined] == ids(3)


def test_searches_take_turns_and_an_item_without_rows_is_not_searched():
    searches = PoisonRowSearches()
    items = [WorkItem(name, "capture") for name in "ab"]
    for item in items:
        assert searches.record_death(item, lambda _: ids(2), "boom", reported=False)
    assert not searches.record_death(WorkItem("manifest", "finish"), lambda _: [], "boom", reported=False)
    assert [len(searches), searches.next_item(), searches.next_item()] == [2, *items]
    assert searches.put_back(items[0])
    assert not searches.put_back(WorkItem("c", "capture"))
    assert searches.record_death(items[1], lambda _: [], "boom again", reported=False)
    assert [searches.next_item(), searches.next_item().rows] == [items[0], (0, 1)]
    assert searches.record_success(items[0])
    assert not searches.record_success(items[1])
    assert searches.next_item().rows == (1, 2)
    assert len(searches) == 0
