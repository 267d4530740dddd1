"""A bar where somebody looks, a line every half minute where nobody does."""

import sys
import time

import pytest

import pipeline.run.progress
from pipeline.run.progress import Progress, counted, heartbeat, line_every_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that have passed, to be set."""
    now_s = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    return now_s


def test_without_a_terminal_there_is_one_line_every_half_minute(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress("a", total=100, unit="step")
    for second in range(1, 101):
        clock[0] = 100.0 + second
        progress.advance(1, tokens=50)
        progress.beat()
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.splitlines() == [
        "a: 30/100 steps, 50 tokens/s, 1:10 left",
        "a: 60/100 steps, 50 tokens/s, 0:40 left",
        "a: 90/100 steps, 50 tokens/s, 0:10 left",
    ]


def test_items_are_counted_as_they_go(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline.progress, "HEARTBEAT_S", 0.0)
    assert list(counted("ab", "reading", "document")) == ["a", "b"]
    assert list(counted("c", "writing", "file", total=2)) == ["c"]
    expected = ["reading: 1 documents", "reading: 2 documents", "writing: 1/2 files, 0:00 left"]
    assert capsys.readouterr().out.splitlines() == expected


def test_work_that_cannot_say_how_far_it_is_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline.progress, "HEARTBEAT_S", 0.02)
    with heartbeat("model x: fetching"):
        time.sleep(0.5)
    assert "model x: fetching: still at it, 0 s\n" in capsys.readouterr().err


@pytest.mark.parametrize(("is_terminal", "expected_s"), [(True, 0.0), (False, 30.0)])
def test_a_terminal_is_somebody_who_looks_on(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, expected_s: float
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    assert line_every_s() == expected_s
