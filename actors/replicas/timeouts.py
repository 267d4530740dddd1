"""Timeouts of a replica, after which its engine counts as hung: measured from its own throughput, not constant."""

from collections import deque
from dataclasses import dataclass, field

from actors.replicas.work import WorkResult


@dataclass
class Timeouts:
    """Learns a teacher's seconds per token from its results. `tokens_per_item` is the most that an item can hold."""

    tokens_per_item: int
    start_s: float = 3600.0
    """For an engine to open: weights may have to be downloaded."""
    schedule_s: float = 120.0
    """For Ray to schedule a replica in a cluster that is idle."""
    first_call_s: float = 600.0
    """For the warm-up of the first engine, before anything is measured: engines compile on first use."""
    first_store_s: float = 120.0
    """Added until an item is stored: the speed of the store is unknown before."""
    floor_s: float = 20.0
    """Added to every timeout for a busy disk or a slow network."""
    factor: float = 10.0
    """How many times slower than the slowest recent item a call may be."""
    _s_per_token: deque[float] = field(default_factory=lambda: deque(maxlen=32))
    _stored: bool = False

    def learn(self, result: WorkResult) -> None:
        """Record the seconds per token of an item (from prefill to commit), a warm-up, or a part of an item."""
        if result.tokens:
            self._s_per_token.append((result.engine_s + result.store_s) / result.tokens)
        self._stored = self._stored or result.store_s > 0

    def call_s(self) -> float:
        """Seconds without a reply from a replica that has items, or that warms up."""
        if not self._s_per_token:
            return self.first_call_s
        slack_s = self.floor_s + (0.0 if self._stored else self.first_store_s)
        return slack_s + self.factor * max(self._s_per_token) * self.tokens_per_item
