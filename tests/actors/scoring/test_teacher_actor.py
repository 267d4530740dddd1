"""A teacher actor without Ray: which of its calls run at the same time."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from actors.replicas.work import WorkItem
from actors.scoring import teacher_actor
from actors.scoring.teacher_actor import TeacherActor, TeacherActorConfig
from pipeline.cache.commit import commit_unit, committed_units
from pipeline.config import recipe_from_dict
from pipeline.corpus.prepare import prepare_cache

WAIT_S = 60


@pytest.fixture
def config(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"id": "d{i}", "text": "row {i} of some text"}}\n' for i in range(12)))
    recipe = recipe_from_dict(
        {
            "name": "t",
            "storage": str(tmp_path / "run"),
            "corpus": {"source": str(text), "sequence_length": 64, "held_out": 0.0},
            "teachers": [{"name": "a", "model": "dummy", "engine": "dummy", "options": {"vocabulary": 300}}],
            "capture": {"k": 4, "unit_sequences": 4},
        }
    )
    prepare_cache(recipe, recipe.teachers[0])
    return TeacherActorConfig(recipe.cache_uri("a"), recipe.teachers[0], recipe.capture.spec(recipe.seed), threads=1)


def test_the_engine_does_not_wait_for_a_slow_store(config, monkeypatch):
    scored, stored, order = threading.Semaphore(0), threading.Event(), []

    def slow_commit(store, unit_id, *arguments):
        """The first unit is not stored before the engine has had the other two."""
        if not stored.is_set():
            assert all(scored.acquire(timeout=WAIT_S) for _ in range(3)), "the engine waits for the store"
            stored.set()
        order.append(f"stored {unit_id}")
        return commit_unit(store, unit_id, *arguments)

    actor = TeacherActor(config)
    actor.open()
    score = actor._engine.score

    def score_and_record(sequences):
        signals = score(sequences)
        order.append("scored")
        scored.release()
        return signals

    monkeypatch.setattr(actor._engine, "score", score_and_record)
    monkeypatch.setattr(teacher_actor, "commit_unit", slow_commit)
    units = [f"train-{number:05d}" for number in range(3)]
    with ThreadPoolExecutor(teacher_actor.CONCURRENT_CALLS) as calls:
        results = list(calls.map(lambda unit_id: actor.capture(WorkItem(unit_id, "capture")), units))
    assert order[:3] == ["scored"] * 3
    assert committed_units(actor._store) == units
    assert [result.rows for result in results] == [4, 4, 4]
    assert actor._stopwatch.wait_share() < 1.0


def test_a_warm_up_measures_an_engine_that_has_scored_nothing(config):
    actor = TeacherActor(config)
    actor.open()
    result = actor.warm_up()
    assert result.tokens > 1
    assert result.engine_s > 0
    assert (result.store_s, result.rows) == (0.0, 0)
    assert committed_units(actor._store) == []
