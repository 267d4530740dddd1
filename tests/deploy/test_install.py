"""`make install` on machines that are not as it needs them. No package is installed here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

INSTALL = Path(__file__).parents[2] / "deploy" / "install"
WITHOUT_VENV = """#!/bin/sh
case "$2" in
  venv) mkdir -p .venv/bin; ln -s {python} .venv/bin/python; echo "The virtual environment was not created"; exit 1;;
  *) exec {python} "$@";;
esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The script, and a list of no packages."""
    (tmp_path / "deploy").mkdir()
    shutil.copy(INSTALL, tmp_path / "deploy")
    (tmp_path / "deploy/requirements-cpu.txt").write_text("# none\n")
    return tmp_path


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def install(tree: Path, python: Path | str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHON": str(python)}
    command = [str(tree / "deploy/install"), "cpu"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)


def refused(done: "subprocess.CompletedProcess[str]", words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: install: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_a_python_without_venv_is_one_line_that_names_the_package(tree: Path) -> None:
    python = script(tree / "python", WITHOUT_VENV.format(python=tree / "bare"))
    script(tree / "bare", f'#!/bin/sh\n[ "$2" = pip ] && exit 1\nexec {sys.executable} "$@"\n')
    for _ in range(2):  # what the first attempt left must not pass for an environment
        refused(install(tree, python), "apt-get install python3-venv")


def test_an_environment_without_pip_is_made_anew(tree: Path) -> None:
    script(tree / ".venv/bin/python", "#!/bin/sh\nexit 1\n")
    done = install(tree, sys.executable)
    assert "stillhouse itself could not be installed" in done.stderr  # there is no project here to install
    assert subprocess.run([tree / ".venv/bin/python", "-m", "pip", "--version"], check=False).returncode == 0


@pytest.mark.parametrize("version", ["3, 10", "3, 14"])
def test_a_python_that_the_lists_do_not_serve_is_refused(tree: Path, version: str) -> None:
    python = script(
        tree / "python",
        f'#!/bin/sh\n[ "$1" = --version ] && echo Python X && exit 0\n'
        f'exec {sys.executable} -c "import sys; sys.version_info = ({version}, 0); exec(sys.argv[1])" "$2"\n',
    )
    refused(install(tree, python), "expected Python 3.11 to 3.13, got Python X")
