"""Finds the rows that kill or hang an engine, by halving. Knows nothing of Ray: leases out, verdicts in.

A unit that went down with an engine is a suspect: others were in flight beside it, or somebody pulled a plug. So it is
tried again, alone. Only if the engine goes down with it a second time, or has said the first time that it died of this
unit, are its rows halved, down to the row; a row is guilty when it brought an engine down twice, alone. Nothing is
stored on the way: the rows that survive are captured in one lease in the end, so that a unit holds the same bytes
however often it was interrupted.
"""

from collections.abc import Sequence

from actors.lease import Casualty, Lease

CHANCES = 2
"""Deaths that a whole unit, and that a single row, are allowed before they are blamed."""


class Inquest:
    """The search through one unit. `sequence_ids` are its rows, in order.

    `announced`: what the engine said if it had time to, for then it is known that this unit was at the engine.
    """

    def __init__(self, unit_id: str, sequence_ids: Sequence[str], announced: str | None = None) -> None:
        self.unit_id = unit_id
        self._sequence_ids = list(sequence_ids)
        self._spans: list[tuple[int, int]] = []
        self._casualties: list[Casualty] = []
        self._deaths = 1
        self._searched = False
        self._one_by_one = False
        if announced is not None:
            self._escalate(announced)

    def lease(self) -> Lease:
        """What to try next; always alone on its replica."""
        if self._spans:
            return Lease(self.unit_id, rows=self._spans[-1])
        return Lease(self.unit_id, casualties=tuple(self._casualties), one_by_one=self._one_by_one)

    def survived(self) -> bool:
        """The engine lived through the lease. True: the unit is committed and the inquest closed."""
        self._deaths = 0
        if not self._spans:
            return True
        self._spans.pop()
        return False

    def died(self, message: str) -> None:
        """The engine went down, or hung, during the lease."""
        self._deaths += 1
        if self._spans:
            self._narrow(message)
        elif self._deaths >= CHANCES:
            self._escalate(message)

    def _narrow(self, message: str) -> None:
        first, last = self._spans[-1]
        if last - first > 1:
            middle = (first + last) // 2
            self._spans[-1:] = [(middle, last), (first, middle)]
            self._deaths = 0
        elif self._deaths >= CHANCES:
            self._spans.pop()
            self._deaths = 0
            self._blame(first, f"brought its engine down {CHANCES} times, alone", message)

    def _escalate(self, message: str) -> None:
        """The whole unit brings engines down: look for the row; then give every row a call of its own; then give up."""
        self._deaths = 0
        if not self._searched:
            self._searched = True
            self._spans = [(0, len(self._sequence_ids))]
            self._narrow(message)
        elif not self._one_by_one:
            self._one_by_one = True
        else:
            blamed = {casualty.sequence_id for casualty in self._casualties}
            for row, sequence_id in enumerate(self._sequence_ids):
                if sequence_id not in blamed:
                    self._blame(row, "its unit brings engines down though no row alone does", message)

    def _blame(self, row: int, reason: str, message: str) -> None:
        self._casualties.append(Casualty(self._sequence_ids[row], reason, message))
