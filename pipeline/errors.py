"""Every error that stillhouse raises on purpose, as one tree.

    StillhouseError
    |-- UsageError              exit 2: what the user asked for cannot be done
    |   |-- RecipeError         a recipe's key, type or value
    |   |-- CorpusError         the text cannot be read or holds nothing
    |   |-- ModelError          a model folder, checkpoint or tokenizer is unfit
    |   |-- StorageError        a place cannot be read from or written to
    |   |-- IdentityError       a cache belongs to another corpus, teacher or spec
    |   `-- AdmissionError      a cache may not be trained from
    |-- DamageError             exit 1: stored bytes are not what was committed
    |-- EngineError             exit 1: a teacher failed
    |   |-- EngineDead          the engine is gone; its process must be replaced
    |   `-- RowError            one sequence cannot be scored, the others can
    |-- TrainingError           exit 1: a student's training cannot go on
    `-- IncompleteError         exit 3: some units failed or are quarantined

A message says what, where, what was got and what was expected, and the next command where one helps. It is one
line: the CLI prints it behind `error: ` and leaves with `exit_code`, without a traceback.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a stillhouse process tells its caller when it ends."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    INCOMPLETE = 3


class StillhouseError(Exception):
    """An error with a one-line message for the user and an exit code for the shell."""

    exit_code = ExitCode.FAILED


class UsageError(StillhouseError):
    """What the user asked for cannot be done."""

    exit_code = ExitCode.USAGE


class RecipeError(UsageError):
    """A recipe's key, type or value is wrong."""


class CorpusError(UsageError):
    """The text cannot be read or holds nothing."""


class ModelError(UsageError):
    """A model folder, checkpoint or tokenizer is unfit."""


class StorageError(UsageError):
    """A place cannot be read from or written to."""


class IdentityError(UsageError):
    """A cache belongs to another corpus, teacher or capture spec."""


class AdmissionError(UsageError):
    """A cache may not be trained from."""


class DamageError(StillhouseError):
    """Stored bytes are not what was committed."""


class EngineError(StillhouseError):
    """A teacher failed."""


class EngineDead(EngineError):
    """The engine is gone: its process must be replaced."""


class RowError(EngineError):
    """One sequence cannot be scored, the others can."""

    def __init__(self, sequence_id: str, reason: str) -> None:
        super().__init__(f"sequence {sequence_id}: {reason}")
        self.sequence_id = sequence_id
        self.reason = reason

    def __reduce__(self) -> tuple[type["RowError"], tuple[str, str]]:
        """Rebuild from both arguments when the error crosses a process boundary."""
        return RowError, (self.sequence_id, self.reason)


class TrainingError(StillhouseError):
    """A student's training cannot go on."""


class IncompleteError(StillhouseError):
    """Some units failed or are quarantined; the others are done."""

    exit_code = ExitCode.INCOMPLETE
