"""Import contracts, what the fast verbs may load, and what no code may contain."""

import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "actors", "student")
HEAVY = ("ray", "torch", "vllm", "transformers", "pandas")


def python_files() -> list[Path]:
    return [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]


def test_import_contracts_hold() -> None:
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


def test_no_module_is_over_400_lines() -> None:
    long = {
        str(file.relative_to(ROOT)): n for file in python_files() if (n := len(file.read_text().splitlines())) > 400
    }
    assert long == {}


FORMER_NAMES = {
    *(
        "casualties",
        "casualty",
        "clerk",
        "clerks",
        "commission",
        "crew",
        "crews",
        "decided",
        "departure",
        "desk",
        "desks",
    ),
    *("inquest", "inquests", "ledger", "office", "patience", "posting", "scribe", "scribes", "settled", "supervise"),
    *("suspects", "sweep", "told", "wing", "wings", "witness"),
}
"""Metaphors of earlier releases, as parts of identifiers, of messages and of prose."""
IN_PROSE_TOO = FORMER_NAMES - {"decided", "desk", "desks", "office", "settled"}


def words_of(text: str) -> set[str]:
    """Lower-case words, those inside of identifiers too."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+", text)}


def test_no_name_and_no_sentence_uses_the_former_words() -> None:
    found = {}
    for file in [*python_files(), *ROOT.glob("*.md"), *ROOT.glob("[a-z]*/**/*.md")]:
        if ".venv" in file.parts or "build" in file.parts:
            continue
        text = file.read_text()
        if words := words_of(text) & IN_PROSE_TOO:
            found[str(file.relative_to(ROOT))] = words
        if file.suffix == ".py":
            names = {token.string for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == 1}
            if words := words_of(" ".join(names)) & FORMER_NAMES:
                found[str(file.relative_to(ROOT))] = words
    assert found == {}


def test_the_documented_way_of_a_token_names_files_that_exist() -> None:
    text = (ROOT / "docs/life-of-a-token.md").read_text()
    steps = text.split("## ")[1]
    files = set(re.findall(r"`((?:pipeline|actors|student)/[a-z_/]+\.py)`", steps))
    assert 1 < len(files) <= 8
    for file, function in re.findall(r"`((?:pipeline|actors|student)/[a-z_/]+\.py)`: `([A-Za-z_.]+)", text):
        source = (ROOT / file).read_text()
        name = function.rpartition(".")[2]
        assert re.search(rf"(?m)^\s*(?:def|class) {name}\b", source), f"{file} defines no {name}"
