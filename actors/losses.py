"""How many engines a crew may lose before its teacher counts as unfit: enough for a poison row and a lost rack."""

from collections.abc import Callable
from dataclasses import dataclass, field

from actors.suspects import CHANCES
from pipeline.errors import EngineError

OPENINGS = 5
"""Engines that may fail to open in a row, besides one for each replica."""
SPARE = 1
"""A death beside all that a search and a crew that is lost as a whole explain."""


@dataclass
class Losses:
    """Counts deaths since a unit was last done, and failed openings since an engine last opened.

    A machine that is gone took its engines with it: these say nothing about the teacher and are not counted, once the
    cluster knows. Until it knows, a whole crew may be lost at once.
    """

    teacher: str
    replicas: int
    """The most that the crew may have."""
    unit_rows: int
    living_nodes: Callable[[], set[str]]
    """Ids of the machines that the cluster takes for alive."""
    _deaths: list[str] = field(default_factory=list)
    _openings: list[str] = field(default_factory=list)

    @property
    def deaths_allowed(self) -> int:
        """All replicas at once, and the search for one poison row: its unit, each halving, and the row alone."""
        halvings = max(self.unit_rows - 1, 0).bit_length()
        return self.replicas + 2 * CHANCES + halvings + SPARE

    @property
    def openings_allowed(self) -> int:
        """Of all replicas, and some more."""
        return self.replicas + OPENINGS

    def died(self, node: str, message: str) -> None:
        """An engine at work died, on that node. Raises EngineError where it is one too many."""
        if self._too_many(self._deaths, node, self.deaths_allowed):
            raise EngineError(
                f"teacher {self.teacher}: {len(self._deaths)} engines in a row died, no unit done between; "
                f"the last: {message}"
            )

    def did_not_open(self, node: str, message: str) -> None:
        """An engine did not open; `node` is "" where it had no place. Raises EngineError where it is one too many."""
        if self._too_many(self._openings, node, self.openings_allowed):
            raise EngineError(
                f"teacher {self.teacher}: {len(self._openings)} engines in a row did not open; the last: {message}"
            )

    def opened(self) -> None:
        """An engine opened."""
        self._openings.clear()

    def worked(self) -> None:
        """An engine did what it was asked."""
        self._deaths.clear()

    def is_gone(self, node: str) -> bool:
        """Whether the cluster knows that the machine is no more."""
        return bool(node) and node not in self.living_nodes()

    def _too_many(self, lost: list[str], node: str, allowed: int) -> bool:
        lost.append(node)
        if len(lost) >= allowed:
            living = self.living_nodes()
            lost[:] = [node for node in lost if not node or node in living]
        return len(lost) >= allowed
