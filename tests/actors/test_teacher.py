"""A replica without Ray: what runs beside what inside of it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from actors import teacher as room
from actors.lease import Lease
from actors.teacher import Posting, Teacher
from pipeline.cache.commit import commit_unit, committed_units
from pipeline.config import recipe_from_dict
from pipeline.corpus.prepare import prepare_cache

WAIT_S = 60


@pytest.fixture
def posting(tmp_path):
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
    return Posting(recipe.cache_uri("a"), recipe.teachers[0], recipe.capture.spec(recipe.seed), threads=1)


def test_the_engine_does_not_wait_for_a_slow_store(posting, monkeypatch):
    scored, stored, order = threading.Semaphore(0), threading.Event(), []

    def slow_commit(store, unit_id, *arguments):
        """The first unit is not stored before the engine has had the other two."""
        if not stored.is_set():
            assert all(scored.acquire(timeout=WAIT_S) for _ in range(3)), "the engine waits for the store"
            stored.set()
        order.append(f"stored {unit_id}")
        return commit_unit(store, unit_id, *arguments)

    replica = Teacher(posting)
    replica.open()
    score = replica._engine.score

    def score_and_tell(sequences):
        signals = score(sequences)
        order.append("scored")
        scored.release()
        return signals

    monkeypatch.setattr(replica._engine, "score", score_and_tell)
    monkeypatch.setattr(room, "commit_unit", slow_commit)
    units = [f"train-{number:05d}" for number in range(3)]
    with ThreadPoolExecutor(room.CALLS_AT_A_TIME) as calls:
        outcomes = list(calls.map(lambda unit_id: replica.capture(Lease(unit_id)), units))
    assert order[:3] == ["scored"] * 3
    assert committed_units(replica._store) == units
    assert [outcome.rows for outcome in outcomes] == [4, 4, 4]
    assert replica.wait_share() < 1.0


def test_a_warm_up_tells_the_pace_of_an_engine_that_has_done_nothing(posting):
    replica = Teacher(posting)
    replica.open()
    outcome = replica.warm_up()
    assert outcome.tokens > 1
    assert outcome.score_s > 0
    assert (outcome.store_s, outcome.rows) == (0.0, 0)
    assert committed_units(replica._store) == []
