"""How many engines may die or fail to open before the teacher counts as unfit."""

from collections.abc import Callable
from dataclasses import dataclass, field

from actors.replicas.poison_rows import ATTEMPTS
from pipeline.errors import EngineError

FAILED_STARTS = 5
"""Engines that may fail to open in a row, besides one for each replica."""
SPARE_DEATHS = 1
"""Deaths allowed beyond one poison-row search plus the loss of all replicas at once."""


@dataclass
class FailureBudget:
    """Counts deaths since an item was last completed, and failed starts since an engine last opened.

    Engines on a node that was lost (spot preemption, a broken machine) are not counted once the cluster knows of the
    loss. Until it knows, the budget covers the loss of all replicas at once.
    """

    teacher: str
    replicas: int
    """The most replicas that the pool may have."""
    rows_per_item: int
    living_nodes: Callable[[], set[str]]
    """Returns the ids of the nodes that the cluster takes for alive."""
    _deaths: list[str] = field(default_factory=list)
    _failed_starts: list[str] = field(default_factory=list)

    @property
    def max_deaths(self) -> int:
        """All replicas at once, and the search for one poison row: its item, each bisection, and the row alone."""
        bisections = max(self.rows_per_item - 1, 0).bit_length()
        return self.replicas + 2 * ATTEMPTS + bisections + SPARE_DEATHS

    @property
    def max_failed_starts(self) -> int:
        """One for each replica, and `FAILED_STARTS`."""
        return self.replicas + FAILED_STARTS

    def record_death(self, node_id: str, message: str) -> None:
        """Count an engine that died on that node after it had opened. Raises EngineError past the budget."""
        if self._exceeded(self._deaths, node_id, self.max_deaths):
            raise EngineError(
                f"teacher {self.teacher}: {len(self._deaths)} engines in a row died, no unit done between; "
                f"the last: {message}"
            )

    def record_failed_start(self, node_id: str, message: str) -> None:
        """Count an engine that did not open; `node_id` is "" if it was not scheduled. Raises EngineError."""
        if self._exceeded(self._failed_starts, node_id, self.max_failed_starts):
            raise EngineError(
                f"teacher {self.teacher}: {len(self._failed_starts)} engines in a row did not open; the last: {message}"
            )

    def record_start(self) -> None:
        """Reset the failed starts: an engine opened."""
        self._failed_starts.clear()

    def record_success(self) -> None:
        """Reset the deaths: a call returned a result."""
        self._deaths.clear()

    def is_lost(self, node_id: str) -> bool:
        """Whether the cluster knows that the node is dead."""
        return bool(node_id) and node_id not in self.living_nodes()

    def _exceeded(self, failures: list[str], node_id: str, allowed: int) -> bool:
        failures.append(node_id)
        if len(failures) >= allowed:
            living = self.living_nodes()
            failures[:] = [node_id for node_id in failures if not node_id or node_id in living]
        return len(failures) >= allowed
