"""A bar on a terminal, otherwise a log line every half minute."""

import logging
import sys
import time

import pytest

import pipeline.run.progress
from pipeline.run.progress import Progress, _display, counted, heartbeat


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
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [
        "a: 30/100 steps, 50 tokens/s, 1:10 left",
        "a: 60/100 steps, 50 tokens/s, 0:40 left",
        "a: 90/100 steps, 50 tokens/s, 0:10 left",
    ]


def test_items_are_counted_as_they_go(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline.run.progress, "HEARTBEAT_S", 0.0)
    assert list(counted("ab", "reading", "document")) == ["a", "b"]
    assert list(counted("c", "writing", "file", total=2)) == ["c"]
    expected = ["reading: 1 documents", "reading: 2 documents", "writing: 1/2 files, 0:00 left"]
    assert capsys.readouterr().err.splitlines() == expected


def test_work_of_unknown_length_logs_that_it_still_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline.run.progress, "HEARTBEAT_S", 0.02)
    with heartbeat("model x: fetching"):
        time.sleep(0.5)
    assert "model x: fetching: still running after 0 s\n" in capsys.readouterr().err


def test_bars_of_one_terminal_share_a_display(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    first, second = Progress("one", total=4), Progress("two", total=2, done=1, unit="file")
    first.advance(2, tokens=100)
    second.update(2, 2)
    logging.getLogger("pipeline.run").info("a line between the bars")
    first.close()
    first.close()
    second.close()
    text = capsys.readouterr().err
    assert "2/4" in text
    assert "2/2" in text
    assert "tokens/s" in text
    assert "a line between the bars" in text
    assert _display.cache_info().currsize == 0


def test_a_display_opens_with_the_first_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    Progress("one", total=4)
    assert _display.cache_info().currsize == 0


@pytest.mark.parametrize(("variable", "value"), [("TERM", "dumb"), ("STILLHOUSE_LOG_FORMAT", "json")])
def test_a_dumb_terminal_and_json_logs_get_no_bars(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Progress.has_terminal()
    monkeypatch.setenv(variable, value)
    assert not Progress.has_terminal()
