"""Finds poison rows, which crash or hang an engine, by bisection. Does not use Ray.

An item whose replica died is under test: other items were in flight beside it, or the machine failed. So it is tried
again, alone on its replica. Only if the engine dies a second time, or has reported the first time that it died during
this item, the rows are bisected, down to one row; a row is poison when the engine died `ATTEMPTS` times on it alone.
Nothing is stored meanwhile: the rows that are not poison are processed in one call in the end, so that a unit has the
same bytes however often it was interrupted.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from actors.replicas.work import QuarantinedRow, WorkItem

ATTEMPTS = 2
"""Deaths of an engine after which a whole item is bisected, or a single row is poison."""


def max_quarantined(cap: float, rows: int) -> int:
    """Rows that may be quarantined: the share `cap` of all, rounded up, so that a small corpus may lose one."""
    return -int(-cap * rows // 1)


class PoisonRowSearch:
    """The bisection of one item. `row_ids` are its rows, in order.

    `reported`: the engine's message if it reported its death, since it is then known that it died during this item.
    """

    def __init__(self, item: WorkItem, row_ids: Sequence[str], reported: str | None = None) -> None:
        self._item = item
        self._row_ids = list(row_ids)
        self._spans: list[tuple[int, int]] = []
        self._quarantined: list[QuarantinedRow] = []
        self._deaths = 1
        self._bisected = False
        self._one_by_one = False
        if reported is not None:
            self._escalate(reported)

    def next_item(self) -> WorkItem:
        """The item, or the part of it, to try next, alone on its replica."""
        if self._spans:
            return replace(self._item, rows=self._spans[-1])
        return replace(self._item, quarantined=tuple(self._quarantined), one_by_one=self._one_by_one)

    def record_success(self) -> bool:
        """Take note that the engine survived. True: the whole item is done, and the search is over."""
        self._deaths = 0
        if not self._spans:
            return True
        self._spans.pop()
        return False

    def record_death(self, message: str) -> None:
        """Take note that the engine died or hung."""
        self._deaths += 1
        if self._spans:
            self._bisect(message)
        elif self._deaths >= ATTEMPTS:
            self._escalate(message)

    def _bisect(self, message: str) -> None:
        first, end = self._spans[-1]
        if end - first > 1:
            middle = (first + end) // 2
            self._spans[-1:] = [(middle, end), (first, middle)]
            self._deaths = 0
        elif self._deaths >= ATTEMPTS:
            self._spans.pop()
            self._deaths = 0
            self._quarantine(first, f"the engine died {ATTEMPTS} times on this row alone", message)

    def _escalate(self, message: str) -> None:
        """The engine dies on the whole item: bisect; then call it row by row; then quarantine every row."""
        self._deaths = 0
        if not self._bisected:
            self._bisected = True
            self._spans = [(0, len(self._row_ids))]
            self._bisect(message)
        elif not self._one_by_one:
            self._one_by_one = True
        else:
            known = {row.sequence_id for row in self._quarantined}
            for row, row_id in enumerate(self._row_ids):
                if row_id not in known:
                    self._quarantine(row, "the engine dies on the rows of this unit, but on no row alone", message)

    def _quarantine(self, row: int, reason: str, message: str) -> None:
        self._quarantined.append(QuarantinedRow(self._row_ids[row], reason, message))


class PoisonRowSearches:
    """All searches of a pool, and the queue of items that have to be tried alone."""

    def __init__(self) -> None:
        self._searches: dict[str, PoisonRowSearch] = {}
        self._queue: deque[str] = deque()

    def __len__(self) -> int:
        """Items that wait to be tried alone."""
        return len(self._queue)

    def next_item(self) -> WorkItem:
        """Take an item off the queue."""
        return self._searches[self._queue.popleft()].next_item()

    def put_back(self, item: WorkItem) -> bool:
        """Queue an item again that did not cause the death of its replica. False where it is not searched."""
        if item.item_id not in self._searches:
            return False
        self._queue.append(item.item_id)
        return True

    def record_death(
        self, item: WorkItem, row_ids: Callable[[WorkItem], Sequence[str]], message: str, *, reported: bool
    ) -> bool:
        """Begin or continue the search in the item. False where it has no `row_ids`, so that it cannot be searched."""
        if (search := self._searches.get(item.item_id)) is not None:
            search.record_death(message)
        elif ids := row_ids(item):
            self._searches[item.item_id] = PoisonRowSearch(item, ids, message if reported else None)
        else:
            return False
        self._queue.append(item.item_id)
        return True

    def record_success(self, item: WorkItem) -> bool:
        """Whether the whole item is done, and not a part of it; the search for the next part is queued."""
        search = self._searches.get(item.item_id)
        if search is not None and not search.record_success():
            self._queue.appendleft(item.item_id)
            return False
        self._searches.pop(item.item_id, None)
        return True
