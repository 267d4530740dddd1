"""Calls an engine with many rows and sets aside those that it raises on, so that the others are processed."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from actors.replicas.work import QuarantinedRow
from pipeline.contracts import Engine, ScoredSequence, TokenSequence
from pipeline.errors import EngineDead, RowError, UsageError


class Row(Protocol):
    """What an engine processes: a sequence or a prompt."""

    @property
    def sequence_id(self) -> str:
        """Its name in errors and in quarantine/."""


RowT = TypeVar("RowT", bound=Row)
OutputT = TypeVar("OutputT")
EngineCall = Callable[[list[RowT]], list[OutputT]]
Processed = tuple[list[tuple[RowT, OutputT]], list[QuarantinedRow]]
Scored = tuple[list[ScoredSequence], list[QuarantinedRow]]


def score_rows(engine: Engine, sequences: Sequence[TokenSequence], *, one_by_one: bool = False) -> Scored:
    """Signals of every row that the engine can score, in order, and the rows that it cannot. See `process_rows`."""
    processed, lost = process_rows(engine.score, sequences, one_by_one=one_by_one)
    return [ScoredSequence(*pair) for pair in processed], lost


def process_rows(
    call: EngineCall[RowT, OutputT], rows: Sequence[RowT], *, one_by_one: bool = False
) -> Processed[RowT, OutputT]:
    """Pair every row that the engine can process with its output, in order, and list the rows that it cannot.

    A row that the engine names in a RowError is set aside; after any other error the rows are bisected. Raises
    EngineDead, and UsageError, which would concern every row of the run.
    """
    if one_by_one:
        return _joined([_process(call, [row]) for row in rows])
    return _process(call, list(rows))


def _process(call: EngineCall[RowT, OutputT], rows: list[RowT]) -> Processed[RowT, OutputT]:
    if not rows:
        return [], []
    try:
        outputs = call(rows)
    except (EngineDead, UsageError):
        raise
    except RowError as error:
        others = [row for row in rows if row.sequence_id != error.sequence_id]
        if len(others) == len(rows):
            return _bisect(call, rows, error)
        lost = QuarantinedRow(error.sequence_id, error.reason, str(error))
        return _joined([_process(call, others), ([], [lost])])
    except Exception as error:
        return _bisect(call, rows, error)
    return list(zip(rows, outputs, strict=True)), []


def _bisect(call: EngineCall[RowT, OutputT], rows: list[RowT], error: Exception) -> Processed[RowT, OutputT]:
    message = f"{type(error).__name__}: {error}"
    if len(rows) == 1:
        return [], [QuarantinedRow(rows[0].sequence_id, "the engine raised on this row alone", message)]
    middle = len(rows) // 2
    return _joined([_process(call, rows[:middle]), _process(call, rows[middle:])])


def _joined(parts: Sequence[Processed[RowT, OutputT]]) -> Processed[RowT, OutputT]:
    return [pair for pairs, _ in parts for pair in pairs], [row for _, lost in parts for row in lost]


class Stopwatch:
    """Measures the share of the time in which an engine idled, since its first call."""

    def __init__(self) -> None:
        self.busy_s = 0.0
        self._since_s: float | None = None

    def add(self, seconds: float) -> None:
        """Add a call that has just ended and took that long."""
        self.busy_s += seconds
        if self._since_s is None:
            self._since_s = time.monotonic() - seconds

    def wait_share(self) -> float:
        """Share of the time without a call; 0 before any."""
        if self._since_s is None:
            return 0.0
        elapsed_s = time.monotonic() - self._since_s
        return max(0.0, 1.0 - self.busy_s / elapsed_s) if elapsed_s > 0 else 0.0
