"""What a part measured: a file of JSON lines that is complete up to the line at which a part was killed.

A line is a `figure` (one way in one case), a `goal` (a measured value beside its bound), a `test` (one test's outcome),
or the `card`.
"""

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Records:
    """Writes lines for one part."""

    path: Path
    part: str

    def figure(
        self,
        case: str,
        way: str,
        *,
        ms: float | None = None,
        rate: float | None = None,
        unit: str | None = None,
        ratio: float | None = None,
        to: str | None = None,
        peak_bytes: int | None = None,
        note: str | None = None,
    ) -> None:
        """One way in one case: its time, `rate` in `unit`, `ratio` to the way `to`, peak memory."""
        values = {"ms": ms, "rate": rate, "unit": unit, "ratio": ratio, "to": to, "peak_bytes": peak_bytes}
        self._write("figure", {"case": case, "way": way, **values, "note": note})

    def goal(
        self, case: str, what: str, value: float, *, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        """A measured value, and the bound that it is held against."""
        self._write("goal", {"case": case, "what": what, "value": value, "at_least": at_least, "at_most": at_most})

    def test(self, name: str, outcome: str, seconds: float, message: str) -> None:
        """One test as pytest reports it."""
        self._write("test", {"name": name, "outcome": outcome, "seconds": seconds, "message": message})

    def card(self, values: Record) -> None:
        """The device and the versions of the libraries."""
        self._write("card", values)

    @contextmanager
    def guard(self, case: str) -> Iterator[None]:
        """Record an exception as the outcome of `case`, so that the part goes on with the next one."""
        try:
            yield
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            words = " ".join(str(error).split())[:200]
            self._write("failure", {"case": case, "message": f"{type(error).__name__}: {words}"})

    def _write(self, kind: str, values: Record) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "part": self.part, **values}) + "\n")


def read_records(path: Path) -> list[Record]:
    """The whole lines of a file; none where there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def is_met(goal: Record) -> bool:
    """Whether a goal's value lies within its bound. A value that is no number does not."""
    if goal["at_least"] is not None:
        return bool(goal["value"] >= goal["at_least"])
    return bool(goal["value"] <= goal["at_most"])
