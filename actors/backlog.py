"""What a crew has left to lend: ids are made one by one, so that a driver's memory does not grow with the plan."""

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.commit import committed_units
from pipeline.cache.storage.store import Store
from pipeline.cache.storage.unit_ids import UnitIds


def pending_places(store: Store, unit_ids: UnitIds) -> NDArray[np.int32]:
    """Places in `unit_ids` of the units without a commit, in order: four bytes a unit."""
    pending = np.ones(len(unit_ids), np.bool_)
    for unit_id in committed_units(store):
        if (place := unit_ids.place(unit_id)) is not None:
            pending[place] = False
    return np.flatnonzero(pending).astype(np.int32)


class Backlog:
    """Unit ids in order, those that came back first. `places` are of the units in `unit_ids` that are pending."""

    def __init__(self, unit_ids: Sequence[str], places: NDArray[np.int32]) -> None:
        self._unit_ids, self._places = unit_ids, places
        self._next = 0
        self._returned: deque[str] = deque()

    def __len__(self) -> int:
        """Units that wait."""
        return len(self._returned) + len(self._places) - self._next

    def take(self) -> str:
        """The next unit; IndexError where none is left."""
        if self._returned:
            return self._returned.popleft()
        place = int(self._places[self._next])
        self._next += 1
        return self._unit_ids[place]

    def give_back(self, unit_id: str) -> None:
        """It goes out again, before the others."""
        self._returned.appendleft(unit_id)
