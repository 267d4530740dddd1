import re

import pytest

from actors.replicas import metrics
from actors.replicas.metrics import PoolMetrics, TeacherMetrics
from actors.replicas.work import WorkResult

PREFIX = "stillhouse_capture_"


class Recorded:
    """Ray's counter or gauge, with its values kept where a test can read them."""

    values: dict[str, list[tuple[str, float]]] = {}

    def __init__(self, name, description, tag_keys):
        self._name = name.removeprefix(PREFIX)
        self.values[self._name] = []

    def set_default_tags(self, tags):
        self._tags = tags

    def set(self, value):
        self.values[self._name].append((self._tags["teacher"], value))

    def inc(self, value=1.0):
        assert value > 0
        self.set(value)


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(metrics, "Counter", Recorded)
    monkeypatch.setattr(metrics, "Gauge", Recorded)
    monkeypatch.setattr(Recorded, "values", {})
    return Recorded.values


def test_names_suit_prometheus_and_end_in_a_unit():
    metrics = [*vars(TeacherMetrics("a")).values(), *vars(PoolMetrics("a")).values()]
    names = [metric.info["name"] for metric in metrics]
    assert len(names) == len(set(names)) == 9
    for name in names:
        assert re.fullmatch(r"stillhouse_capture_[a-z_]+", name)
        assert name.endswith(("_total", "_units", "_replicas", "_per_token", "_per_s", "_share"))


def test_a_unit_without_rows_can_be_recorded():
    TeacherMetrics("a").record(WorkResult("u"), wait_share=0.0)


def test_a_committed_unit_counts_with_its_tokens_bytes_rows_pace_and_wait(recorded):
    metrics = TeacherMetrics("a")
    metrics.record(WorkResult("u", tokens=100, stored_bytes=700, engine_s=0.5, quarantined=2), wait_share=0.25)
    metrics.record(WorkResult("v", tokens=50, stored_bytes=300, engine_s=0.1), wait_share=0.5)
    assert recorded == {
        "tokens_total": [("a", 100), ("a", 50)],
        "stored_bytes_total": [("a", 700), ("a", 300)],
        "quarantined_rows_total": [("a", 2)],
        "tokens_per_s": [("a", 200.0), ("a", 500.0)],
        "device_wait_share": [("a", 0.25), ("a", 0.5)],
    }


def test_a_pool_records_its_queue_replicas_bytes_and_retries(recorded):
    metrics = PoolMetrics("b")
    metrics.record(queue=7, replicas=2, bytes_per_token=6.5)
    metrics.count_retry()
    assert recorded == {
        "queue_units": [("b", 7)],
        "replicas": [("b", 2)],
        "bytes_per_token": [("b", 6.5)],
        "retries_total": [("b", 1.0)],
    }
