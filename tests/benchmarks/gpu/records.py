"""Records of a part: a file of JSON lines, complete up to the line at which the part's process was killed.

A line is a `figure` (one variant in one case), a `goal` (a measured value with its bound), a `test` (the outcome of one
test), a `failure` (an exception in one case), or the `device`.
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
    """Appends records of one part to a file."""

    path: Path
    part: str

    def figure(
        self,
        case: str,
        variant: str,
        *,
        ms: float | None = None,
        rate: float | None = None,
        unit: str | None = None,
        ratio: float | None = None,
        to: str | None = None,
        peak_bytes: int | None = None,
        note: str | None = None,
    ) -> None:
        """Record one variant in one case: time, `rate` in `unit`, `ratio` to the variant `to`, peak memory."""
        values = {"ms": ms, "rate": rate, "unit": unit, "ratio": ratio, "to": to, "peak_bytes": peak_bytes}
        self._write("figure", {"case": case, "variant": variant, **values, "note": note})

    def goal(
        self,
        case: str,
        quantity: str,
        value: float,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        is_numerical: bool = False,
        note: str | None = None,
    ) -> None:
        """Record a measured value with its bound. A numerical error has to meet its bound at tiny sizes too."""
        bounds = {"at_least": at_least, "at_most": at_most, "is_numerical": is_numerical}
        self._write("goal", {"case": case, "quantity": quantity, "value": value, **bounds, "note": note})

    def test(self, name: str, outcome: str, seconds: float, message: str) -> None:
        """Record one test as pytest reports it."""
        self._write("test", {"name": name, "outcome": outcome, "seconds": seconds, "message": message})

    def device(self, values: Record) -> None:
        """Record properties of the device and the versions of the libraries."""
        self._write("device", values)

    @contextmanager
    def catch_failure(self, case: str) -> Iterator[None]:
        """Record an exception as the failure of `case`, so that the part continues with the next case."""
        try:
            yield
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            message = " ".join(str(error).split())[:200]
            self._write("failure", {"case": case, "message": f"{type(error).__name__}: {message}"})

    def _write(self, kind: str, values: Record) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "part": self.part, **values}) + "\n")


def read_records(path: Path) -> list[Record]:
    """Return the complete lines of a file; an empty list if there is no file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def is_met(goal: Record) -> bool:
    """Return whether a goal's value is within its bound; False for NaN."""
    if goal["at_least"] is not None:
        return bool(goal["value"] >= goal["at_least"])
    return bool(goal["value"] <= goal["at_most"])
