"""Scores what can be scored: one bad row does not cost the others theirs."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from actors.lease import Casualty
from pipeline.contracts import Engine, ScoredSequence, TokenSequence
from pipeline.errors import EngineDead, RowError, UsageError


class Row(Protocol):
    """Whatever an engine is asked about: a sequence, or a prompt."""

    @property
    def sequence_id(self) -> str:
        """What errors and the quarantine call it."""
        ...


AskedRow = TypeVar("AskedRow", bound=Row)
Answer = TypeVar("Answer")
Ask = Callable[[list[AskedRow]], list[Answer]]
Answered = tuple[list[tuple[AskedRow, Answer]], list[Casualty]]
Scored = tuple[list[ScoredSequence], list[Casualty]]


def score_rows(engine: Engine, sequences: Sequence[TokenSequence], *, one_by_one: bool = False) -> Scored:
    """Signals of every row that the engine can process, in order, and the rows that it cannot. See `ask_rows`."""
    answered, lost = ask_rows(engine.score, sequences, one_by_one=one_by_one)
    return [ScoredSequence(*pair) for pair in answered], lost


def ask_rows(
    ask: Ask[AskedRow, Answer], rows: Sequence[AskedRow], *, one_by_one: bool = False
) -> Answered[AskedRow, Answer]:
    """What an engine answers to every row that it can process, in order, and the rows that it cannot.

    A row that the engine names is set aside; where it fails without a name, the rows are halved until one is left.
    Raises EngineDead, and UsageError where no row of the whole run could go better.
    """
    if one_by_one:
        return _joined([_ask_some(ask, [row]) for row in rows])
    return _ask_some(ask, list(rows))


def allowed_casualties(cap: float, rows: int) -> int:
    """Rows that may be quarantined: that share of all, rounded up, so that a small corpus may lose one."""
    return -int(-cap * rows // 1)


def _ask_some(ask: Ask[AskedRow, Answer], rows: list[AskedRow]) -> Answered[AskedRow, Answer]:
    if not rows:
        return [], []
    try:
        answers = ask(rows)
    except (EngineDead, UsageError):
        raise
    except RowError as error:
        others = [row for row in rows if row.sequence_id != error.sequence_id]
        if len(others) == len(rows):
            return _halved(ask, rows, error)
        casualty = Casualty(error.sequence_id, error.reason, str(error))
        return _joined([_ask_some(ask, others), ([], [casualty])])
    except Exception as error:
        return _halved(ask, rows, error)
    return list(zip(rows, answers, strict=True)), []


def _halved(ask: Ask[AskedRow, Answer], rows: list[AskedRow], error: Exception) -> Answered[AskedRow, Answer]:
    message = f"{type(error).__name__}: {error}"
    if len(rows) == 1:
        return [], [Casualty(rows[0].sequence_id, "the engine raised on this row alone", message)]
    middle = len(rows) // 2
    return _joined([_ask_some(ask, rows[:middle]), _ask_some(ask, rows[middle:])])


def _joined(parts: Sequence[Answered[AskedRow, Answer]]) -> Answered[AskedRow, Answer]:
    return [pair for pairs, _ in parts for pair in pairs], [casualty for _, lost in parts for casualty in lost]


class Stopwatch:
    """How much of the time an engine had work, since its first."""

    def __init__(self) -> None:
        self.busy_s = 0.0
        self._since_s: float | None = None

    def timed(self, seconds: float) -> None:
        """That many seconds of work have just ended."""
        self.busy_s += seconds
        if self._since_s is None:
            self._since_s = time.monotonic() - seconds

    def wait_share(self) -> float:
        """Share of the time without work; 0 before any."""
        if self._since_s is None:
            return 0.0
        elapsed_s = time.monotonic() - self._since_s
        return max(0.0, 1.0 - self.busy_s / elapsed_s) if elapsed_s > 0 else 0.0
