"""Throughput of a capture, summed over all its runs. Stored beside the cache, outside its fingerprint."""

import json
from dataclasses import asdict, dataclass

from pipeline.cache.storage.layout import TIMING_JSON
from pipeline.cache.storage.store import Store


@dataclass(frozen=True, slots=True)
class CaptureThroughput:
    """Captured tokens, and the seconds between the first replica's start and the last unit."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """None before anything was measured."""
        return self.tokens / self.seconds if self.seconds > 0 else None


def read_throughput(store: Store) -> CaptureThroughput:
    """The stored throughput; zero where there is none."""
    data = store.read_if_present(TIMING_JSON)
    return CaptureThroughput() if data is None else CaptureThroughput(**json.loads(data))


def add_throughput(store: Store, tokens: int, seconds: float) -> None:
    """Add one run's tokens and seconds."""
    before = read_throughput(store)
    total = CaptureThroughput(before.tokens + tokens, round(before.seconds + seconds, 3))
    store.put(TIMING_JSON, json.dumps(asdict(total)).encode())
