"""Fault points do nothing unless the environment sets one, and refuse malformed settings."""

import multiprocessing
import signal
import timeit

import pytest

from pipeline.cache.storage import fault_points
from pipeline.errors import UsageError


def exit_code(point: fault_points.Point, unit_id: str) -> int | None:
    process = multiprocessing.get_context("fork").Process(target=fault_points.fault_point, args=(point, unit_id))
    process.start()
    process.join(30)
    return process.exitcode


def test_an_unset_fault_does_nothing_and_takes_under_50_us(monkeypatch):
    monkeypatch.delenv(fault_points.ENVIRONMENT_KEY, raising=False)
    for point in fault_points.POINTS:
        fault_points.fault_point(point, "train-00000")
    seconds = min(timeit.repeat(lambda: fault_points.fault_point("mid_write", "train-00000"), number=1000, repeat=5))
    assert seconds / 1000 < 50e-6


def test_a_fault_acts_at_its_point_and_unit_only(monkeypatch):
    monkeypatch.setenv(fault_points.ENVIRONMENT_KEY, "after_write:train-00001:kill")
    assert exit_code("after_write", "train-00001") == -signal.SIGKILL
    assert exit_code("after_write", "train-00002") == 0
    assert exit_code("before_write", "train-00001") == 0
    monkeypatch.setenv(fault_points.ENVIRONMENT_KEY, "after_write:*:exit")
    assert exit_code("after_write", "train-00002") == 70


@pytest.mark.parametrize("setting", ["kill", "before_write:train-00000", "nowhere:*:kill", "mid_write:*:explode", "::"])
def test_a_malformed_setting_is_refused(monkeypatch, setting):
    monkeypatch.setenv(fault_points.ENVIRONMENT_KEY, setting)
    with pytest.raises(UsageError, match="expected point:unit:action, a point of before_write"):
        fault_points.fault_point("before_write", "train-00000")
