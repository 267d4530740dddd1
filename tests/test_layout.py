"""Which room may import which, what the fast verbs may load, and what may stand nowhere in the code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "actors", "student")
HEAVY = ("ray", "torch", "vllm", "transformers", "pandas")


def python_files() -> list[Path]:
    return [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]


def test_arrows_point_down() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "--help"], ["run", "no-such-recipe"]])
def test_fast_verbs_load_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom pipeline.run.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_no_pickle_and_no_remote_code() -> None:
    forbidden = re.compile(r"\bimport pickle|torch\.load\(|allow_pickle=True|trust_remote_code=True|np\.load\(")
    found = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in python_files()
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if forbidden.search(line)
    ]
    assert found == []


def test_no_room_is_over_400_lines() -> None:
    long = {
        str(file.relative_to(ROOT)): n for file in python_files() if (n := len(file.read_text().splitlines())) > 400
    }
    assert long == {}
