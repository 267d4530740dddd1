"""How far a run is, as its storage alone tells it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cache.storage.layout import MANIFEST_JSON
from pipeline.cache.storage.store import Store
from pipeline.config import Recipe, load_recipe
from pipeline.corpus.prepare import prepare_cache
from pipeline.errors import ExitCode
from pipeline.run.cli import main
from pipeline.run.status import status


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe("dummy", [f"storage={tmp_path / 'run'}", "corpus.max_tokens=1024"])


def test_before_anything_has_begun(recipe: Recipe) -> None:
    found = status(recipe)
    assert found.exit_code is ExitCode.INCOMPLETE
    assert str(found).splitlines()[0].endswith("incomplete")
    assert str(found).count("not started") == 3


def test_a_prepared_cache_has_its_plan_and_no_units(recipe: Recipe) -> None:
    prepared = prepare_cache(recipe, recipe.teachers[0])
    (cache,) = status(recipe).caches
    assert (cache.units, cache.committed, cache.finished) == (len(prepared.unit_ids), 0, False)


def test_a_captured_cache_is_finished_by_its_manifest(recipe: Recipe, capture_here: Callable[[Recipe], None]) -> None:
    capture_here(recipe)
    (cache,) = status(recipe).caches
    assert cache.finished
    assert cache.committed == cache.units > 0
    assert 0 < cache.tokens < cache.bytes
    assert not status(recipe).complete
    Store.open(recipe.cache_uri("dummy")).delete(MANIFEST_JSON)
    assert not status(recipe).caches[0].finished


def test_a_training_is_as_far_as_its_log(recipe: Recipe) -> None:
    store = Store.open(recipe.student_uri("student"))
    store.put("log.jsonl", b'{"step": 3, "steps": 9}\n{"step": 4, "steps": 9}\n')
    student, control = status(recipe).students
    assert (student.name, student.step, student.steps, student.finished) == ("student", 4, 9, False)
    assert (control.name, control.steps) == ("student-control", 0)
    store.put("train.json", b"{}")
    assert status(recipe).students[0].finished


def test_programs_get_json_and_the_exit_code(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "dummy", f"storage={recipe.storage}", "--json"]) == ExitCode.INCOMPLETE
    assert json.loads(capsys.readouterr().out)["complete"] is False
