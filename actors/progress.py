"""How a capture shows that it moves: a bar on a terminal, elsewhere one line every half minute."""

import sys
import time
from typing import Any

HEARTBEAT_S = 30.0


class Progress:
    """Counts the tokens and units of one teacher. `done` and `total` are units; the pace is of this run alone."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title = title
        self.total = total
        self.done = done
        self.tokens = 0
        self._already = done
        self._started_s = time.monotonic()
        self._stopped_s: float | None = None
        self._spoke_s = self._started_s
        self._bar: Any = _bar(title, total, done) if sys.stderr.isatty() else None

    def advance(self, units: int, tokens: int) -> None:
        """So much more is done."""
        self.done += units
        self.tokens += tokens
        if self._bar is not None:
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
        return f"{self.title}: {self.done}/{self.total} units, {self.tokens_per_s():,.0f} tokens/s, {self._left()} left"

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

    def _left(self) -> str:
        run = self.done - self._already
        if not run:
            return "unknown time"
        seconds = (time.monotonic() - self._started_s) / run * (self.total - self.done)
        hours, rest = divmod(round(seconds), 3600)
        minutes, seconds = divmod(rest, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _bar(title: str, total: int, done: int) -> Any:
    from tqdm import tqdm

    return tqdm(desc=title, total=total, initial=done, unit="unit", dynamic_ncols=True)
