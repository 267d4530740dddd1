"""Scores what can be scored: one bad row does not cost the others theirs."""

import time
from collections.abc import Sequence

from actors.lease import Casualty
from pipeline.contracts import Engine, ScoredSequence, TokenSequence
from pipeline.errors import EngineDead, RowError, UsageError

Scored = tuple[list[ScoredSequence], list[Casualty]]


def score_rows(engine: Engine, sequences: Sequence[TokenSequence], *, one_by_one: bool = False) -> Scored:
    """Signals of every row that the engine can process, in order, and the rows that it cannot.

    A row that the engine names is set aside; where it fails without a name, the rows are halved until one is left.
    Raises EngineDead, and UsageError where no row of the whole run could go better.
    """
    if one_by_one:
        return _joined([_score_some(engine, [sequence]) for sequence in sequences])
    return _score_some(engine, list(sequences))


def _score_some(engine: Engine, sequences: list[TokenSequence]) -> Scored:
    if not sequences:
        return [], []
    try:
        signals = engine.score(sequences)
    except (EngineDead, UsageError):
        raise
    except RowError as error:
        others = [sequence for sequence in sequences if sequence.sequence_id != error.sequence_id]
        if len(others) == len(sequences):
            return _halved(engine, sequences, error)
        casualty = Casualty(error.sequence_id, error.reason, str(error))
        return _joined([_score_some(engine, others), ([], [casualty])])
    except Exception as error:
        return _halved(engine, sequences, error)
    return [ScoredSequence(*pair) for pair in zip(sequences, signals, strict=True)], []


def _halved(engine: Engine, sequences: list[TokenSequence], error: Exception) -> Scored:
    message = f"{type(error).__name__}: {error}"
    if len(sequences) == 1:
        return [], [Casualty(sequences[0].sequence_id, "the engine raised on this row alone", message)]
    middle = len(sequences) // 2
    return _joined([_score_some(engine, sequences[:middle]), _score_some(engine, sequences[middle:])])


def _joined(parts: Sequence[Scored]) -> Scored:
    return [row for rows, _ in parts for row in rows], [casualty for _, lost in parts for casualty in lost]


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
