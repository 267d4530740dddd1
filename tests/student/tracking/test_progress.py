"""Reports of finished steps, and how the job's process shows them."""

import sys

import pytest

from pipeline.run.progress import HEARTBEAT_S
from student.tracking import step_recorder
from student.tracking.progress import StepProgress, StepReport
from student.tracking.step_recorder import StepReporter

LOG = {"loss": 2.5, "kd": 1.25, "ce": 3.0, "gradient_norm": 0.75}
TIMING = {"tokens_per_s": 1234.4, "memory_bytes": 3 << 29, "input_wait_share": 0.015}


@pytest.fixture
def clock(monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr(step_recorder.time, "monotonic", lambda: now_s[0])
    return now_s


def reports(clock, every_s, steps=10, step_s=10.0):
    reported = []
    reporter = StepReporter("student", steps, reported.append, every_s)
    for step in range(1, steps + 1):
        clock[0] += step_s
        reporter.report(LOG | {"step": step}, TIMING)
    return reported


def test_a_report_has_losses_throughput_memory_and_input_wait(clock):
    first, *_, last = reports(clock, 0.0)
    metrics = "loss 2.5000 kd 1.2500 ce 3.0000, norm 0.75, 1234 tokens/s, 1.50 GiB, input wait 1.5 %"
    assert first == StepReport("student", step=1, steps=10, metrics=metrics, summary="loss 2.500, 1234 tokens/s")
    assert last.step == 10


def numbers(reported):
    return [report.step for report in reported]


def test_an_interval_of_0_reports_every_step(clock):
    assert numbers(reports(clock, 0.0, step_s=0.0)) == list(range(1, 11))


def test_an_interval_reports_the_first_and_last_step_and_one_per_interval(clock):
    assert numbers(reports(clock, HEARTBEAT_S)) == [1, 4, 7, 10]
    assert numbers(reports(clock, HEARTBEAT_S, step_s=0.1)) == [1, 10]


def test_without_a_terminal_every_report_is_a_log_line_with_the_time_left(clock, capsys):
    progress = StepProgress()
    assert progress.every_s == HEARTBEAT_S
    progress.show(StepReport("student", 5, 10, "loss 2.5", ""))
    clock[0] += 10.0
    progress.show(StepReport("student", 6, 10, "loss 2.0", ""))
    progress.close()
    assert capsys.readouterr().err.splitlines() == [
        "student: 5/10 steps, unknown time left (loss 2.5)",
        "student: 6/10 steps, 0:40 left (loss 2.0)",
    ]


def test_a_terminal_shows_one_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    progress = StepProgress()
    assert progress.every_s < 1.0
    for step in (1, 2, 3):
        progress.show(StepReport("student", step, 3, "all metrics", f"loss {4 - step}.0"))
    progress.close()
    text = capsys.readouterr().err
    assert "3/3" in text
    assert "loss 1.0" in text
    assert "\nstudent: 3/3 steps," not in text
