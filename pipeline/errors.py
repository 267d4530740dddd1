"""The errors that stillhouse raises on purpose.

A message is one line: what, where, got and expected, and the next command where one helps. The command line logs it as
an error and exits with `exit_code`, without a traceback.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every stillhouse process."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    INCOMPLETE = 3


class StillhouseError(Exception):
    """An error with a one-line message for the user and an exit code for the shell."""

    exit_code = ExitCode.FAILED


class UsageError(StillhouseError):
    """A request that cannot be fulfilled."""

    exit_code = ExitCode.USAGE


class RecipeError(UsageError):
    """A recipe's key, type or value is wrong."""


class CorpusError(UsageError):
    """The text is unreadable or empty."""


class ModelError(UsageError):
    """A model folder, checkpoint or tokenizer is unfit."""


class StorageError(UsageError):
    """A storage cannot be read or written."""


class IdentityError(UsageError):
    """A cache has another corpus, teacher or capture spec."""


class AdmissionError(UsageError):
    """A cache may not be trained from."""


class DamageError(StillhouseError):
    """Stored bytes differ from what was committed."""


class EngineError(StillhouseError):
    """A teacher failed."""


class EngineDead(EngineError):
    """The engine has died: its process must be replaced."""


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
