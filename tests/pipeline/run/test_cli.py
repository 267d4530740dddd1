"""The command line itself: options, errors of usage, and the verbs that only read a recipe."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from pipeline.errors import ExitCode
from pipeline.run.cli import main

VERBS = (
    "run",
    "capture",
    "train",
    "evaluate",
    "plan",
    "status",
    "validate",
    "recipes",
    "verify",
    "inspect",
    "gc",
    "export",
)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["Missing command", "see: stillhouse --help"]),
        (["destil", "dummy"], ["No such command 'destil'", "see: stillhouse --help"]),
        (["run"], ["Missing argument 'RECIPE'", "see: stillhouse run --help"]),
        (["run", "dummy", "--gpus", "2"], ["No such option '--gpus'", "see: stillhouse run --help"]),
        (["status", "dummy", "--json", "other"], ["expected key.path=value behind the recipe, got 'other'"]),
        (["plan", "dummy", "--tokens-per-s", "0"], ["expected a number above 0, got 0", "stillhouse plan --help"]),
        (["plan", "dummy", "--tokens-per-s", "nan"], ["expected a number above 0, got nan"]),
        (["plan", "dummy", "--tokens-per-s", "fast"], ["'fast'"]),
        (["plan", "dummy", "--tokens-per-s", "9", "--probe"], ["--probe and --tokens-per-s exclude each other"]),
        (["run", "dummy", "--log-format", "xml"], ["'xml'", "'json'"]),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(arguments, words, capsys) -> None:
    assert main(arguments) == ExitCode.USAGE
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    for word in words:
        assert word in output.err


def test_overrides_may_follow_options(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    main(["status", "dummy", "--json", "name=other"])
    assert json.loads(capsys.readouterr().out)["name"] == "other"


def test_help_lists_every_verb_and_the_exit_codes(capsys) -> None:
    assert main(["--help"]) == ExitCode.DONE
    text = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n  {verb} " in text
    assert "3 incomplete" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_version(capsys) -> None:
    assert main(["--version"]) == ExitCode.DONE
    assert capsys.readouterr().out == f"stillhouse {version('stillhouse')}\n"


def test_recipes_lists_what_ships(capsys) -> None:
    assert main(["recipes", "--json"]) == ExitCode.DONE
    shipped = json.loads(capsys.readouterr().out)
    assert {"dummy", "quickstart"} <= set(shipped)
    assert all(shipped.values())
    assert main(["recipes"]) == ExitCode.DONE
    assert f"quickstart: {shipped['quickstart']}\n" in capsys.readouterr().out


def test_validate_accepts_a_recipe_and_prints_it_with_every_default(capsys) -> None:
    assert main(["validate", "quickstart"]) == ExitCode.DONE
    assert capsys.readouterr().out == "recipe quickstart: valid (teachers: 1, students: 1)\n"
    assert main(["validate", "quickstart", "seed=5", "--json"]) == ExitCode.DONE
    values = json.loads(capsys.readouterr().out)
    assert values["seed"] == 5
    assert values["training"]["weight_decay"] >= 0


def test_validate_refuses_a_wrong_recipe_in_one_line(capsys) -> None:
    assert main(["validate", "quickstart", "training.wrokers=1"]) == ExitCode.USAGE
    assert "did you mean workers?" in capsys.readouterr().err


def test_a_closed_pipe_ends_a_verb_quietly() -> None:
    command = [sys.executable, "-m", "pipeline.run.cli", "validate", "quickstart", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (141, b"")
