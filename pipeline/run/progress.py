"""Progress of long work: a bar on a terminal, otherwise a log line every half minute."""

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from pipeline.run.logs import uses_json

if TYPE_CHECKING:
    import rich.progress

HEARTBEAT_S = 30.0
"""Seconds between two lines of one progress."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Progress:
    """Progress of one piece of work in units, and in tokens where it has any.

    `total` is None where it is unknown. The throughput counts what this process has done, not the units of `done`.
    """

    def __init__(self, title: str, total: int | None = None, done: int = 0, unit: str = "unit") -> None:
        self.title, self.total, self.done = title, total, done
        self.tokens = 0
        self._unit = unit
        self._done_before = done
        self._started_s = time.monotonic()
        self._stopped_s: float | None = None
        self._logged_s = self._started_s
        self._bar: _Bar | None = None
        self._shows_bar = self.has_terminal()

    @staticmethod
    def has_terminal() -> bool:
        """Whether progress is shown as bars."""
        return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not uses_json()

    def advance(self, units: int, tokens: int = 0) -> None:
        """Count work that is done."""
        self.done += units
        self.tokens += tokens
        self._refresh(f"{self.tokens_per_s():,.0f} tokens/s" if self.tokens else "")

    def update(self, done: int, total: int) -> None:
        """Set how much is done, and of how much."""
        self.done, self.total = done, total
        self._refresh("")

    def restart_clock(self) -> None:
        """Measure the throughput from now on: without the time in which engines start."""
        self._started_s = time.monotonic()

    def stop_clock(self) -> None:
        """Measure the throughput up to now."""
        self._stopped_s = time.monotonic()

    def beat(self, note: str = "", *, now: bool = False) -> None:
        """Log a line if HEARTBEAT_S have passed since the last one, or `now`; `note` is added to it, or to the bar."""
        if self._shows_bar:
            if note or self._bar is None:
                self._refresh(note)
            return
        now_s = time.monotonic()
        if now or now_s - self._logged_s >= HEARTBEAT_S:
            self._logged_s = now_s
            logger.info("%s%s", self.line(), f" ({note})" if note else "")

    def line(self) -> str:
        """`capture smollm2: 12/40 units, 812 tokens/s, 0:31 left`."""
        of = "" if self.total is None else f"/{self.total}"
        throughput = f", {self.tokens_per_s():,.0f} tokens/s" if self.tokens else ""
        left = "" if self.total is None else self._left(self.total)
        return f"{self.title}: {self.done}{of} {self._unit}s{throughput}{left}"

    def seconds(self) -> float:
        """Seconds that the throughput is measured over."""
        return max((self._stopped_s or time.monotonic()) - self._started_s, 1e-9)

    def tokens_per_s(self) -> float:
        """Throughput of this process."""
        return self.tokens / self.seconds()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def _refresh(self, note: str) -> None:
        if self._shows_bar:
            self._bar = self._bar or _Bar(self.title, self.total, self.done, self._unit)
            self._bar.update(self.done, self.total, note)

    def _left(self, total: int) -> str:
        done = self.done - self._done_before
        if not done:
            return ", unknown time left"
        seconds = (time.monotonic() - self._started_s) / done * (total - self.done)
        hours, rest = divmod(round(seconds), 3600)
        minutes, seconds = divmod(rest, 60)
        return f", {hours}:{minutes:02d}:{seconds:02d} left" if hours else f", {minutes}:{seconds:02d} left"


def counted(items: Iterable[T], title: str, unit: str, total: int | None = None) -> Iterator[T]:
    """Yield the items and show their number."""
    with closing(Progress(title, total, unit=unit)) as progress:
        for item in items:
            yield item
            progress.advance(1)
            progress.beat()


@contextmanager
def heartbeat(title: str) -> Iterator[None]:
    """Log a line every half minute while the block runs: for work whose progress is unknown."""
    started_s, ended = time.monotonic(), threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_S):
            logger.info("%s: still running after %.0f s", title, time.monotonic() - started_s)

    thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class _Bar:
    """A row of the terminal's one display: rich shows the bars of a process together."""

    def __init__(self, title: str, total: int | None, done: int, unit: str) -> None:
        self._display = _display()
        self._task = self._display.add_task(title, total=total, completed=done, unit=f"{unit}s", note="")

    def update(self, done: int, total: int | None, note: str) -> None:
        self._display.update(self._task, completed=done, total=total, note=note)

    def close(self) -> None:
        """Stop the row, and the display with the last one, so that the terminal gets its cursor back."""
        self._display.stop_task(self._task)
        if all(task.stop_time is not None for task in self._display.tasks):
            self._display.stop()
            _display.cache_clear()


@cache
def _display() -> "rich.progress.Progress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]} {task.fields[note]}"),
        TimeRemainingColumn(compact=True),
    )
    display = Progress(*columns, console=Console(stderr=True), redirect_stdout=False)
    display.start()
    atexit.register(display.stop)
    return display
