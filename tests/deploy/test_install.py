"""`deploy/install` with missing or unsupported Pythons. No package is downloaded."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
WITHOUT_VENV = """#!/bin/sh
case "$2" in
  venv) mkdir -p .venv/bin; ln -s {python} .venv/bin/python; echo "The virtual environment was not created"; exit 1;;
  *) exec {python} "$@";;
esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with the script and an empty package list."""
    (tmp_path / "deploy").mkdir()
    for name in ("install", "uv_settings.py"):
        shutil.copy(DEPLOY / name, tmp_path / "deploy")
    (tmp_path / "deploy/requirements-cpu.txt").write_text("# none\n")
    return tmp_path


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def install(tree: Path, python: Path | str, **environment: str) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHON": str(python)} | environment
    command = [str(tree / "deploy/install"), "cpu"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)


def assert_refused(done: "subprocess.CompletedProcess[str]", words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: install: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_a_python_without_venv_is_refused_with_the_package_to_install(tree: Path) -> None:
    python = script(tree / "python", WITHOUT_VENV.format(python=tree / "bare"))
    script(tree / "bare", f'#!/bin/sh\n[ "$2" = pip ] && exit 1\nexec {sys.executable} "$@"\n')
    for _ in range(2):  # the first attempt leaves an incomplete .venv
        assert_refused(install(tree, python), "apt-get install python3-venv")


def wheel(folder: Path, name: str) -> Path:
    """Write a wheel with one empty module."""
    metadata = f"{name}-1.dist-info"
    files = {
        f"{name}.py": "",
        f"{metadata}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n",
        f"{metadata}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{metadata}/RECORD"])
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as archive:
        for path, text in (files | {f"{metadata}/RECORD": record}).items():
            archive.writestr(path, text)
    return folder


def test_a_venv_without_pip_is_recreated_and_filled_by_uv_or_pip(tree: Path) -> None:
    script(tree / ".venv/bin/python", "#!/bin/sh\nexit 1\n")
    (tree / "deploy/requirements-cpu.txt").write_text("stillhouse-thing==1\n")
    wheels = wheel(tree / "wheels", "stillhouse_thing")
    uv = Path(sys.executable).parent / "uv"
    for has_uv in (False, True) if uv.exists() else (False,):  # uv could not be installed here
        if has_uv:
            shutil.copy(uv, tree / ".venv/bin/uv")
        done = install(tree, sys.executable, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))
        assert "stillhouse itself could not be installed" in done.stderr  # the folder has no project
        assert ("+ stillhouse-thing==1" in (tree / ".venv/install.log").read_text()) == has_uv  # uv's format
        remove = [tree / ".venv/bin/python", "-m", "pip", "uninstall", "--yes", "stillhouse-thing"]
        assert "Successfully uninstalled" in subprocess.run(remove, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("version", ["3, 10", "3, 14"])
def test_an_unsupported_python_version_is_refused(tree: Path, version: str) -> None:
    python = script(
        tree / "python",
        f'#!/bin/sh\n[ "$1" = --version ] && echo Python X && exit 0\n'
        f'exec {sys.executable} -c "import sys; sys.version_info = ({version}, 0); exec(sys.argv[1])" "$2"\n',
    )
    assert_refused(install(tree, python), "expected Python 3.11 to 3.13, got Python X")
