"""Generation replicas that die, hang, are not scheduled or take turns write the same answers as undisturbed ones."""

import json
import os
import re
import signal
import threading
import time
from functools import partial

import pytest

from actors.capture import capture
from actors.generate.answer_prompts import prepare_caches
from actors.generate.generation_work import BATCH_PROMPTS
from actors.replicas.timeouts import Timeouts
from pipeline.cache import quarantine
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage.layout import GENERATED
from pipeline.cache.storage.store import Store
from pipeline.cache.unit_list import UnitList
from pipeline.config import recipe_from_dict
from pipeline.contracts import Document
from pipeline.corpus.answers import prompt_name, quarantined_prompts
from pipeline.errors import EngineError, ExitCode
from student.data.dataset import CacheDataset

PROMPTS = 12
SHORT = Timeouts(1, first_call_s=4.0, first_store_s=0.0, floor_s=4.0, schedule_s=2.0)
pytestmark = pytest.mark.usefixtures("two_cpus_of_ray")


def recipe_in(folder, *teachers, storage="run", prompts=PROMPTS, max_tokens=None, **capture_settings):
    text = folder / f"prompts{prompts}.jsonl"
    rows = [{"id": f"d{i}", "text": f"Question {i}: "} for i in range(prompts)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = {"name": "a", "model": "dummy", "engine": "dummy", "sampling": {"max_tokens": 12}}
    return recipe_from_dict(
        {
            "name": "t",
            "storage": str(folder / storage),
            "corpus": {"source": str(text), "sequence_length": 64, "max_tokens": max_tokens, "held_out": 0.25},
            "teachers": [{**base, **teacher} for teacher in teachers or ({},)],
            "capture": {"k": 4, "unit_sequences": 4, "quarantine_cap": 0.1, **capture_settings},
        }
    )


@pytest.fixture
def make_recipe(tmp_path):
    return partial(recipe_in, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, two_cpus_of_ray):
    """The answers of a run without faults."""
    whole = recipe_in(tmp_path_factory.mktemp("undisturbed"), options())
    prepare_caches(whole, whole.teachers)
    return [line for data in generated(whole).values() for line in data.splitlines()]


def options(**more):
    return {"options": {"vocabulary": 300, **more}}


def generated(recipe, teacher="a"):
    store = Store.open(recipe.cache_uri(teacher))
    return {path: store.read(path) for path in store.list(GENERATED)}


def name_of(number, teacher="a"):
    return prompt_name(Document(f"d{number}", text=""), teacher)


def documents_of(recipe, teacher):
    reader = CacheReader.open(Store.open(recipe.cache_uri(teacher)))
    return {split: [row.sequence.document_id for row in reader.rows(split)] for split in ("train", "held_out")}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["dead", "kill", "hang", "row_error", "error"])
def test_a_prompt_that_no_engine_survives_is_quarantined_and_the_others_are_answered(make_recipe, undisturbed, fault):
    recipe = make_recipe(options(**{f"{fault}_on": name_of(5)}))
    prepare_caches(recipe, recipe.teachers, SHORT)
    store = Store.open(recipe.cache_uri("a"))
    (entry,) = quarantine.entries(store)
    assert quarantined_prompts(store) == [entry.sequence_id] == [name_of(5)]
    assert entry.unit_id in generated(recipe)
    assert entry.reason
    assert entry.engine_message
    expected = [line for line in undisturbed if b'"d5@a"' not in line]
    assert len(expected) == PROMPTS - 1
    assert [line for data in generated(recipe).values() for line in data.splitlines()] == expected


@pytest.mark.slow
def test_a_lost_prompt_makes_the_capture_incomplete(make_recipe, capsys):
    recipe = make_recipe(options(row_error_on=name_of(5)))
    assert capture(recipe, recipe.teachers) is ExitCode.INCOMPLETE
    assert "1 prompts in quarantine" in capsys.readouterr().err


@pytest.mark.slow
def test_more_lost_prompts_than_the_cap_end_the_run(make_recipe):
    recipe = make_recipe(options(row_error_on=",".join(name_of(i) for i in range(4))))
    with pytest.raises(EngineError, match=r"teacher a: 4 prompts quarantined, expected at most 2 of 12"):
        prepare_caches(recipe, recipe.teachers)


@pytest.mark.slow
def test_an_engine_that_always_dies_ends_the_run_with_its_cause(make_recipe):
    recipe = make_recipe(options(dead_every=1))
    started_s = time.monotonic()
    with pytest.raises(EngineError, match=r"engines in a row died.*injected fault: engine died"):
        prepare_caches(recipe, recipe.teachers)
    assert time.monotonic() - started_s < 120


@pytest.mark.slow
def test_an_engine_that_never_opens_ends_the_run_with_its_cause(make_recipe, tmp_path):
    recipe = make_recipe(options(openings=str(tmp_path / "log"), dead_openings=1000))
    with pytest.raises(EngineError, match=r"engines in a row did not open; the last: .*died at opening"):
        prepare_caches(recipe, recipe.teachers)


@pytest.mark.slow
def test_killed_replicas_are_restarted_and_write_the_same(make_recipe, tmp_path):
    whole = make_recipe(options(), storage="whole", prompts=3 * BATCH_PROMPTS)
    prepare_caches(whole, whole.teachers)
    log = tmp_path / "log"
    recipe = make_recipe(options(openings=str(log), delay_s_per_token=0.004), prompts=3 * BATCH_PROMPTS)
    work = threading.Thread(target=prepare_caches, args=(recipe, recipe.teachers))
    work.start()
    killed = 0
    while work.is_alive():
        openings = log.read_text().split() if log.exists() else []
        if killed < min(len(openings), 2) and len(generated(recipe)) >= killed:
            time.sleep(0.3)  # during the batch, which takes one and a half seconds
            os.kill(int(openings[-1]), signal.SIGKILL)
            killed += 1
        time.sleep(0.05)
    assert killed == 2
    assert len(log.read_text().split()) >= 3
    assert generated(recipe) == generated(whole)
    assert quarantined_prompts(Store.open(recipe.cache_uri("a"))) == []


@pytest.mark.slow
def test_replicas_grow_with_the_requested_batches_up_to_their_maximum(make_recipe, tmp_path, capsys):
    log = tmp_path / "log"
    teacher = {**options(openings=str(log), delay_s_per_token=0.01), "replicas": [1, 2]}
    recipe = make_recipe(teacher, prompts=6 * BATCH_PROMPTS)
    prepare_caches(recipe, recipe.teachers)
    assert len(set(log.read_text().split())) == 2
    assert f"generate a: {6 * BATCH_PROMPTS} prompts answered, 0 retries, 0 quarantined" in capsys.readouterr().err


@pytest.mark.slow
def test_a_replica_that_is_not_scheduled_does_not_wait_for_ever(make_recipe):
    recipe = make_recipe({**options(), "placement": {"label_selector": {"zone": "nowhere"}}})
    with pytest.raises(EngineError, match=r"did not open; the last: not scheduled within 2 s in an idle cluster"):
        prepare_caches(recipe, recipe.teachers, SHORT)


def both(**more):
    return [{"name": name, **options(seed=seed), **more} for seed, name in enumerate("ab")]


@pytest.mark.slow
def test_teachers_score_each_others_answers_and_their_caches_join(make_recipe, capsys):
    reader = {"name": "c", "sampling": None, **options(seed=7)}
    recipe = make_recipe(*both(), reader, answers="all")
    assert capture(recipe, recipe.teachers) is ExitCode.DONE
    assert capsys.readouterr().err.count(f"{PROMPTS} prompts answered") == 2
    ids = documents_of(recipe, "a")
    assert {i for split in ids.values() for i in split} == {f"d{i}@{by}" for i in range(PROMPTS) for by in "ab"}
    assert {i.split("@")[0] for i in ids["train"]}.isdisjoint(i.split("@")[0] for i in ids["held_out"])
    assert ids["held_out"]
    readers = [CacheReader.open(Store.open(recipe.cache_uri(name))) for name in "abc"]
    dataset = CacheDataset(readers, "train")
    assert len(dataset) == len(ids["train"])
    for number in range(len(dataset)):
        views = dataset[number]
        assert len({view.sequence.document_id for view in views}) == 1
        assert len({view.signals.label_logprob_T.tobytes() for view in views}) == 3
    assert capture(recipe, recipe.teachers) is ExitCode.DONE


@pytest.mark.slow
def test_teachers_that_do_not_fit_side_by_side_take_turns_and_write_the_same(make_recipe):
    """With a cap few batches are requested ahead, and the teachers are read in turn: an idle one must give way."""
    many = 4 * BATCH_PROMPTS
    wide = make_recipe(*both(), storage="wide", prompts=many, max_tokens=3000, answers="all")
    caches = prepare_caches(wide, wide.teachers)
    tight = make_recipe(*both(placement={"cpus": 2.0}), prompts=many, max_tokens=3000, answers="all")
    again = prepare_caches(tight, tight.teachers)
    assert [cache.fingerprint for cache in again] == [cache.fingerprint for cache in caches]
    for name in "ab":
        common = generated(wide, name).keys() & generated(tight, name).keys()
        assert len(common) >= 2
        assert all(generated(wide, name)[path] == generated(tight, name)[path] for path in common)


def test_a_folder_of_answers_keeps_the_split_of_the_prompts(make_recipe, tmp_path):
    recipe = make_recipe(*both(), answers="all")
    prepare_caches(recipe, recipe.teachers)
    merged = tmp_path / "merged"
    merged.mkdir()
    for name in "ab":
        for path, data in generated(recipe, name).items():
            (merged / f"{name}-{re.sub('[^0-9a-z.]', '-', path)}").write_bytes(data)
    values = recipe.to_dict()
    values["corpus"]["source"], values["storage"] = str(merged), str(tmp_path / "later")
    values["capture"]["answers"] = "own"
    values["teachers"] = [{**values["teachers"][0], "sampling": None}]
    later = recipe_from_dict(values)
    (cache,) = prepare_caches(later, later.teachers)
    sides = {}
    units = UnitList.open(cache.store)
    for unit_id in units.unit_ids():
        for row in units.read(unit_id).sequences:
            sides.setdefault(row.document_id.split("@")[0], []).append(row.split)
    assert len(sides) == PROMPTS
    assert all(len(both_sides) == 2 and len(set(both_sides)) == 1 for both_sides in sides.values())
