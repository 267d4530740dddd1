"""How long a teacher may be silent before it counts as hung: measured from its own speed, not a constant."""

from collections import deque
from dataclasses import dataclass, field

from actors.lease import Outcome


@dataclass
class Patience:
    """Learns a teacher's pace from its outcomes. `tokens_per_unit` is the most that a unit can hold."""

    tokens_per_unit: int
    opening_s: float = 3600.0
    """For an engine to open: weights may come from far away."""
    arrival_s: float = 120.0
    """For a replica to get a place in a cluster that is idle."""
    first_s: float = 600.0
    """For the warm-up of the first engine, before anything is measured: engines compile on first use."""
    first_store_s: float = 120.0
    """Added until a unit is stored: nothing says before how fast the store is."""
    floor_s: float = 20.0
    """Added to every deadline: what a busy disk or a slow network may take."""
    factor: float = 10.0
    """How many times slower than the slowest recent unit an engine may become."""
    _paces: deque[float] = field(default_factory=lambda: deque(maxlen=32))
    _stored: bool = False

    def learn(self, outcome: Outcome) -> None:
        """Take note of the seconds a token that a unit took, from prefill to commit, or a warm-up, or a probe."""
        if outcome.tokens:
            self._paces.append((outcome.score_s + outcome.store_s) / outcome.tokens)
        self._stored = self._stored or outcome.store_s > 0

    def deadline_s(self) -> float:
        """Seconds without any answer from a replica that has work."""
        if not self._paces:
            return self.first_s
        slack_s = self.floor_s + (0.0 if self._stored else self.first_store_s)
        return slack_s + self.factor * max(self._paces) * self.tokens_per_unit
