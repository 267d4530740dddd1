"""What a pool has done in this run, and the metrics that Ray exports to Prometheus."""

from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from ray.util.metrics import Counter, Gauge

from actors.replicas.work import WorkResult

LABELS = ("teacher",)
MetricT = TypeVar("MetricT", Counter, Gauge)


@dataclass
class PoolStats:
    """Totals of a pool in this run. Times are summed over replicas."""

    items: int = 0
    rows: int = 0
    tokens: int = 0
    stored_bytes: int = 0
    engine_s: float = 0.0
    store_s: float = 0.0
    running_s: float = 0.0
    """Time with an open engine, without the final checks."""
    retries: int = 0
    quarantined: int = 0
    """Rows in quarantine, those of earlier runs included."""

    def add(self, result: WorkResult) -> None:
        """Add a completed item."""
        self.items += 1
        self.rows += result.rows
        self.tokens += result.tokens
        self.stored_bytes += result.stored_bytes
        self.engine_s += result.engine_s
        self.store_s += result.store_s
        self.quarantined += result.quarantined

    def bytes_per_token(self) -> float:
        """Stored bytes per token; 0 before the first."""
        return self.stored_bytes / self.tokens if self.tokens else 0.0

    def bottleneck(self) -> str:
        """What limited the throughput, with its share of the replicas' time."""
        if self.running_s <= 0:
            return "nothing ran"
        stages = {"the teacher's engine": self.engine_s, "encoding and storage": self.store_s}
        stage, busy_s = max(stages.items(), key=lambda item: item[1])
        share = min(busy_s / self.running_s, 1.0)
        return (
            f"{stage} (busy {share:.0%})" if share >= 0.5 else f"feeding the replicas ({stage} busy {share:.0%} only)"
        )


class TeacherMetrics:
    """Metrics of one replica of the scoring pool. Names end in their unit."""

    def __init__(self, teacher: str) -> None:
        counter, gauge = partial(_create, Counter, teacher), partial(_create, Gauge, teacher)
        self._tokens = counter("stillhouse_capture_tokens_total", "Tokens captured and committed")
        self._bytes = counter("stillhouse_capture_stored_bytes_total", "Bytes of committed shards")
        self._quarantined = counter("stillhouse_capture_quarantined_rows_total", "Rows put into quarantine")
        self._throughput = gauge("stillhouse_capture_tokens_per_s", "Tokens per second of the last unit in the engine")
        self._wait = gauge("stillhouse_capture_device_wait_share", "Share of time in which the engine idled")

    def record(self, result: WorkResult, wait_share: float) -> None:
        """Record a committed unit."""
        _add(self._tokens, result.tokens)
        _add(self._bytes, result.stored_bytes)
        _add(self._quarantined, result.quarantined)
        self._throughput.set(result.tokens / result.engine_s if result.engine_s else 0.0)
        self._wait.set(wait_share)


class PoolMetrics:
    """Metrics of a pool. `job` is `capture` or `generate`, `item_noun` what its queue holds."""

    def __init__(self, teacher: str, job: str = "capture", item_noun: str = "units") -> None:
        prefix = f"stillhouse_{job}"
        counter, gauge = partial(_create, Counter, teacher), partial(_create, Gauge, teacher)
        self._queue = gauge(f"{prefix}_queue_{item_noun}", f"Queued {item_noun}")
        self._replicas = gauge(f"{prefix}_replicas", "Running replicas")
        self._bytes_per_token = gauge(f"{prefix}_bytes_per_token", "Stored bytes per token")
        self._retries = counter(f"{prefix}_retries_total", "Calls that were repeated after a death")

    def record(self, queue: int, replicas: int, bytes_per_token: float) -> None:
        """Record the present state. `bytes_per_token`: 0 where nothing is measured."""
        self._queue.set(queue)
        self._replicas.set(replicas)
        if bytes_per_token:
            self._bytes_per_token.set(bytes_per_token)

    def count_retry(self) -> None:
        """Count a call that is repeated."""
        self._retries.inc()


def _add(counter: Counter, amount: int) -> None:
    """Increase the counter; Ray's counters refuse 0."""
    if amount > 0:
        counter.inc(amount)


def _create(kind: type[MetricT], teacher: str, name: str, description: str) -> MetricT:
    metric = kind(name, description=description, tag_keys=LABELS)
    metric.set_default_tags({"teacher": teacher})
    return metric
