"""What Prometheus and the dashboards see of a capture, through Ray's own metrics."""

from ray.util.metrics import Counter, Gauge

from actors.lease import Outcome

LABELS = ("teacher",)


class TeacherMetrics:
    """Recorded by every replica. Names end in their unit."""

    def __init__(self, teacher: str) -> None:
        self._tokens = _counter("stillhouse_capture_tokens_total", "Tokens captured and committed", teacher)
        self._bytes = _counter("stillhouse_capture_stored_bytes_total", "Bytes of committed shards", teacher)
        self._quarantined = _counter("stillhouse_capture_quarantined_rows_total", "Rows put into quarantine", teacher)
        self._pace = _gauge(
            "stillhouse_capture_tokens_per_s", "Tokens a second of the last unit, at the engine", teacher
        )
        self._wait = _gauge(
            "stillhouse_capture_device_wait_share", "Share of time without work for the engine", teacher
        )

    def record(self, outcome: Outcome, wait_share: float) -> None:
        """Take note of one committed unit."""
        _add(self._tokens, outcome.tokens)
        _add(self._bytes, outcome.stored_bytes)
        _add(self._quarantined, outcome.casualties)
        self._pace.set(outcome.tokens / outcome.score_s if outcome.score_s else 0.0)
        self._wait.set(wait_share)


class CrewMetrics:
    """Recorded by the supervisor, one set a teacher."""

    def __init__(self, teacher: str) -> None:
        self._queue = _gauge("stillhouse_capture_queue_units", "Units that wait for a replica", teacher)
        self._replicas = _gauge("stillhouse_capture_replicas", "Replicas that serve", teacher)
        self._bytes_per_token = _gauge("stillhouse_capture_bytes_per_token", "Stored bytes a token", teacher)
        self._retries = _counter("stillhouse_capture_retries_total", "Leases that had to be given out again", teacher)

    def record(self, queue: int, replicas: int, bytes_per_token: float) -> None:
        """Take note of where the crew stands."""
        self._queue.set(queue)
        self._replicas.set(replicas)
        self._bytes_per_token.set(bytes_per_token)

    def retry(self) -> None:
        """A lease goes out again."""
        self._retries.inc()


def _add(counter: Counter, amount: int) -> None:
    """Ray's counters refuse a step of 0."""
    if amount > 0:
        counter.inc(amount)


def _counter(name: str, description: str, teacher: str) -> Counter:
    counter = Counter(name, description=description, tag_keys=LABELS)
    counter.set_default_tags({"teacher": teacher})
    return counter


def _gauge(name: str, description: str, teacher: str) -> Gauge:
    gauge = Gauge(name, description=description, tag_keys=LABELS)
    gauge.set_default_tags({"teacher": teacher})
    return gauge
