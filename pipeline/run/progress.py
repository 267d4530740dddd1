"""How a stage shows that it moves: a bar on a terminal, elsewhere one line every half minute."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

HEARTBEAT_S = 30.0

T = TypeVar("T")


def line_every_s() -> float:
    """Seconds between two lines of one kind on this process' output: 0, every line, where that is a terminal."""
    return 0.0 if sys.stdout.isatty() else HEARTBEAT_S


class Progress:
    """Counts units and tokens. `done` and `total` are units, None where nobody knows; the pace is of this run alone."""

    def __init__(self, title: str, total: int | None, done: int = 0, unit: str = "unit") -> None:
        self.title = title
        self.total = total
        self.done = done
        self.tokens = 0
        self._unit = unit
        self._already = done
        self._started_s = time.monotonic()
        self._stopped_s: float | None = None
        self._spoke_s = self._started_s
        self._bar: Any = _bar(title, total, done, unit) if sys.stderr.isatty() else None

    def advance(self, units: int, tokens: int = 0) -> None:
        """So much more is done."""
        self.done += units
        self.tokens += tokens
        if self._bar is not None:
            if self.tokens:
                self._bar.set_postfix_str(f"{self.tokens_per_s():,.0f} tokens/s", refresh=False)
            self._bar.update(units)

    def restart_clock(self) -> None:
        """The first replica serves: the pace counts from here, without the time that engines take to open."""
        self._started_s = time.monotonic()

    def stop_clock(self) -> None:
        """The last unit is done; what comes after does not count into the pace."""
        self._stopped_s = time.monotonic()

    def beat(self, note: str = "") -> None:
        """Say where things stand, if it is time."""
        now_s = time.monotonic()
        if self._bar is None and now_s - self._spoke_s >= HEARTBEAT_S:
            self._spoke_s = now_s
            print(f"{self.line()}{f' ({note})' if note else ''}", flush=True)

    def line(self) -> str:
        """`capture smollm2: 12/40 units, 812 tokens/s, 0:31 left`."""
        of = "" if self.total is None else f"/{self.total}"
        pace = f", {self.tokens_per_s():,.0f} tokens/s" if self.tokens else ""
        left = "" if self.total is None else self._left(self.total)
        return f"{self.title}: {self.done}{of} {self._unit}s{pace}{left}"

    def seconds(self) -> float:
        """From the first replica's readiness to the last unit."""
        return max((self._stopped_s or time.monotonic()) - self._started_s, 1e-9)

    def tokens_per_s(self) -> float:
        """Pace of this run."""
        return self.tokens / self.seconds()

    def close(self) -> None:
        """No more to show."""
        if self._bar is not None:
            self._bar.close()

    def _left(self, total: int) -> str:
        run = self.done - self._already
        if not run:
            return ", unknown time left"
        seconds = (time.monotonic() - self._started_s) / run * (total - self.done)
        hours, rest = divmod(round(seconds), 3600)
        minutes, seconds = divmod(rest, 60)
        return f", {hours}:{minutes:02d}:{seconds:02d} left" if hours else f", {minutes}:{seconds:02d} left"


def counted(items: Iterable[T], title: str, unit: str, total: int | None = None) -> Iterator[T]:
    """The items as they come, shown as they go."""
    progress = Progress(title, total, unit=unit)
    try:
        for item in items:
            yield item
            progress.advance(1)
            progress.beat()
    finally:
        progress.close()


@contextmanager
def heartbeat(what: str) -> Iterator[None]:
    """A line every half minute, for as long as the block runs: for work that cannot say how far it is."""
    started_s, ended = time.monotonic(), threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_S):
            print(f"{what}: still at it, {time.monotonic() - started_s:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=beat, daemon=True, name="heartbeat")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _bar(title: str, total: int | None, done: int, unit: str) -> Any:
    from tqdm import tqdm

    return tqdm(desc=title, total=total, initial=done, unit=unit, dynamic_ncols=True)
