"""The progress lines of a training."""

import re

import pytest

from pipeline.run.progress import HEARTBEAT_S
from student.tracking import progress_lines
from student.tracking.progress_lines import ProgressLines, duration

LOG = {"loss": 2.5, "kd": 1.25, "ce": 3.0, "gradient_norm": 0.75}
TIMING = {"tokens_per_s": 1234.4, "memory_bytes": 3 << 29, "input_wait_share": 0.015}


@pytest.fixture
def clock(monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr(progress_lines.time, "monotonic", lambda: now_s[0])
    return now_s


def printed_lines(clock, every_s, first_step=0, steps=10, step_s=10.0):
    printed = []
    lines = ProgressLines("student", steps, first_step, printed.append, every_s)
    for step in range(first_step + 1, steps + 1):
        clock[0] += step_s
        lines.show(LOG | {"step": step}, TIMING)
    return printed


def test_a_line_has_losses_throughput_memory_input_wait_and_time_left(clock):
    first, *_, last = printed_lines(clock, 0.0, first_step=4)
    assert first == (
        "student step 5/10 | loss 2.5000 kd 1.2500 ce 3.0000 | norm 0.75 | 1234 tokens/s | 1.50 GiB | "
        "input wait 1.5 % | 50 s left"
    )
    assert last.startswith("student step 10/10 | ")
    assert last.endswith(" | 0 s left")


def numbers(printed):
    return [int(re.search(r"step (\d+)/", line)[1]) for line in printed]


def test_an_interval_of_0_prints_every_step(clock):
    assert numbers(printed_lines(clock, 0.0, step_s=0.0)) == list(range(1, 11))


def test_an_interval_prints_the_first_and_last_step_and_one_line_per_interval(clock):
    assert numbers(printed_lines(clock, HEARTBEAT_S)) == [1, 4, 7, 10]
    assert numbers(printed_lines(clock, HEARTBEAT_S, step_s=0.1)) == [1, 10]


def test_a_duration_has_at_most_two_units():
    assert [duration(s) for s in (0.4, 59.4, 200.0, 7500.0)] == ["0 s", "59 s", "3 min 20 s", "2 h 5 min"]
