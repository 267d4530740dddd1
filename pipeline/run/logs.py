"""Logging of every stillhouse process: readable lines or JSON lines on stderr.

Results that a user asked for (tables, `--json`) are printed to stdout; everything else is logged. The settings are
environment variables, so that the processes of a run's jobs, Ray's workers and vLLM's processes inherit them:

    STILLHOUSE_LOG=LEVEL[,LOGGER=LEVEL...]    default: info,ray=error,vllm=warning
    STILLHOUSE_LOG_FORMAT=text|json           default: text
"""

import json
import logging
import os
import socket
import sys
from datetime import UTC, datetime

from pipeline.errors import UsageError

LEVELS_VARIABLE = "STILLHOUSE_LOG"
FORMAT_VARIABLE = "STILLHOUSE_LOG_FORMAT"
FORMATS = ("text", "json")
PACKAGES = ("pipeline", "actors", "student", "__main__")
"""Loggers that an unnamed level in STILLHOUSE_LOG applies to; `__main__` is the module of a job's process."""
DEFAULTS = {"": "info", "ray": "error", "vllm": "warning"}
VERBOSE = ("", "info,ray=info,vllm=info", "debug,ray=debug,vllm=debug")
"""STILLHOUSE_LOG by how often `-v` is given."""


def configure_logging() -> None:
    """Set up this process' loggers from the environment. May be called again.

    Raises UsageError for an unknown level or format.
    """
    root = logging.getLogger()
    if not any(isinstance(handler, _StderrHandler) for handler in root.handlers):
        root.addHandler(_StderrHandler())
    formatter = _JsonFormatter() if uses_json() else _TextFormatter()
    levels = _levels()
    for handler in root.handlers:
        if isinstance(handler, _StderrHandler):
            handler.setFormatter(formatter)
    for name, level in levels.items():
        for logger in [name] if name else PACKAGES:
            logging.getLogger(logger).setLevel(level)


def set_log_options(verbosity: int = 0, log_format: str | None = None) -> None:
    """Apply the command line's options to this process and, through the environment, to those that it starts."""
    if verbosity:
        os.environ[LEVELS_VARIABLE] = VERBOSE[min(verbosity, len(VERBOSE) - 1)]
    if log_format is not None:
        os.environ[FORMAT_VARIABLE] = log_format
    configure_logging()


def log_environment() -> dict[str, str]:
    """The variables that are set, for processes on other machines."""
    return {name: os.environ[name] for name in (LEVELS_VARIABLE, FORMAT_VARIABLE) if name in os.environ}


def level_of(package: str) -> str:
    """The level that a package's own logging is to have, upper case, as Ray and vLLM take it."""
    levels = _levels()
    return levels.get(package, levels[""])


def stamp_host(record: logging.LogRecord) -> bool:
    """Filter that notes this host in a record that another host will format; lets every record pass."""
    record.host = socket.gethostname()
    return True


def uses_json() -> bool:
    """Whether the log is JSON lines. Raises UsageError for an unknown format."""
    chosen = os.environ.get(FORMAT_VARIABLE) or "text"
    if chosen not in FORMATS:
        raise UsageError(f"{FORMAT_VARIABLE}={chosen}: expected text or json")
    return chosen == "json"


def _levels() -> dict[str, str]:
    levels = dict(DEFAULTS)
    setting = os.environ.get(LEVELS_VARIABLE, "")
    for part in filter(None, setting.split(",")):
        name, _, level = part.rpartition("=")
        if level.upper() not in logging.getLevelNamesMapping():
            expected = "LEVEL or LOGGER=LEVEL with debug, info, warning or error"
            raise UsageError(f"{LEVELS_VARIABLE}={setting}: expected {expected}, got {part!r}")
        levels[name] = level
    return {name: level.upper() for name, level in levels.items()}


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what `sys.stderr` is at that time: a progress bar replaces it while it is shown."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(_TextFormatter())

    @property
    def stream(self):  # type: ignore[no-untyped-def]  # noqa: ANN202
        """The stream of the moment."""
        return sys.stderr


class _TextFormatter(logging.Formatter):
    """The message alone at INFO; `warning: ...`, `error: ...`, `debug: logger: ...` at other levels."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        if record.levelno == logging.INFO:
            return text
        name = f"{record.name}: " if record.levelno < logging.INFO else ""
        return f"{record.levelname.lower()}: {name}{text}"


class _JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "host": getattr(record, "host", None) or socket.gethostname(),
            "pid": record.process,
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)
