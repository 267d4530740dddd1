"""How long a cache took to capture, added up over all the starts that it took. Beside the cache, not part of it."""

import json
from dataclasses import asdict, dataclass

from pipeline.cache.storage.layout import TIMING_JSON
from pipeline.cache.storage.store import Store


@dataclass(frozen=True, slots=True)
class CaptureThroughput:
    """Tokens that were captured, and the seconds from the first replica's readiness to the last unit."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """None where nothing was timed."""
        return self.tokens / self.seconds if self.seconds > 0 else None


def read_throughput(store: Store) -> CaptureThroughput:
    """What is kept in the cache's folder; nothing, where another release has filled it."""
    data = store.read_if_present(TIMING_JSON)
    return CaptureThroughput() if data is None else CaptureThroughput(**json.loads(data))


def add_throughput(store: Store, tokens: int, seconds: float) -> None:
    """One more start has captured so much in that time."""
    before = read_throughput(store)
    pace = CaptureThroughput(before.tokens + tokens, round(before.seconds + seconds, 3))
    store.put(TIMING_JSON, json.dumps(asdict(pace)).encode())
