"""Log levels and formats from the environment and from the command line."""

import json
import logging

import pytest

from pipeline.errors import ExitCode, UsageError
from pipeline.run.cli import main
from pipeline.run.logs import FORMAT_VARIABLE, LEVELS_VARIABLE, configure_logging, level_of, log_environment

logger = logging.getLogger("pipeline.of_test")


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """No settings at first; afterwards the loggers of the other tests again."""
    names = ("", "pipeline", "actors", "student", "ray", "vllm", logger.name)
    before = {name: logging.getLogger(name).level for name in names}
    for name in (LEVELS_VARIABLE, FORMAT_VARIABLE):
        monkeypatch.setenv(name, "")
    yield
    monkeypatch.undo()
    configure_logging()
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


def lines(capsys) -> list[str]:
    for level in ("debug", "info", "warning", "error"):
        getattr(logger, level)("a %s", level)
    return capsys.readouterr().err.splitlines()


def test_info_is_the_bare_message_and_other_levels_are_named(capsys) -> None:
    configure_logging()
    assert lines(capsys) == ["a info", "warning: a warning", "error: a error"]


def test_levels_by_logger(monkeypatch, capsys) -> None:
    monkeypatch.setenv(LEVELS_VARIABLE, "error,pipeline.of_test=debug,ray=info")
    configure_logging()
    assert lines(capsys)[0] == "debug: pipeline.of_test: a debug"
    assert level_of("ray") == "INFO"
    assert level_of("vllm") == "WARNING"
    assert level_of("actors") == "ERROR"


def test_json_lines_carry_time_level_logger_and_process(monkeypatch, capsys) -> None:
    monkeypatch.setenv(FORMAT_VARIABLE, "json")
    configure_logging()
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("with a cause")
    (line,) = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert {"time", "level", "logger", "message", "host", "pid", "exception"} == set(record)
    assert (record["level"], record["logger"], record["message"]) == ("error", "pipeline.of_test", "with a cause")
    assert "ValueError: broken" in record["exception"]


def test_configuring_twice_writes_a_line_once(capsys) -> None:
    configure_logging()
    configure_logging()
    assert len(lines(capsys)) == 3


@pytest.mark.parametrize(
    ("variable", "value"), [(LEVELS_VARIABLE, "loud"), (LEVELS_VARIABLE, "ray=x"), (FORMAT_VARIABLE, "xml")]
)
def test_unknown_settings_are_refused(monkeypatch, variable, value, capsys) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=f"{variable}={value}: expected"):
        configure_logging()
    assert main(["recipes"]) == ExitCode.USAGE
    assert capsys.readouterr().err.count("\n") == 1


def test_options_reach_the_processes_that_are_started(capsys) -> None:
    assert main(["validate", "dummy", "-v", "--log-format", "json"]) == ExitCode.DONE
    assert log_environment() == {LEVELS_VARIABLE: "info,ray=info,vllm=info", FORMAT_VARIABLE: "json"}
    assert main(["validate", "dummy", "training.wrokers=1"]) == ExitCode.USAGE
    assert json.loads(capsys.readouterr().err)["level"] == "error"
