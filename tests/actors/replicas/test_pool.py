"""A scoring pool on a real Ray, with dummy engines that fail on command."""

import json
import os
import random
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import ray

from actors.capture import CaptureTask, capture, create_pool, score_pending
from actors.replicas.pool import ReplicaPool, run_pools
from actors.replicas.replica import Replica, ReplicaState
from actors.replicas.timeouts import Timeouts
from pipeline.cache import quarantine
from pipeline.cache.storage.layout import MANIFEST_JSON
from pipeline.cache.storage.store import Store
from pipeline.cache.unit_list import UnitList
from pipeline.config import recipe_from_dict
from pipeline.errors import EngineError, ExitCode, RecipeError

WORDS = ["copper", "kettle", "barley", "water", "yeast", "oak"]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def make_recipe(tmp_path):
    def make(*teachers, documents=40, storage="run", **capture):
        text = tmp_path / f"{documents}.jsonl"
        draw = random.Random(3)
        lines = [{"id": f"d{i}", "text": " ".join(draw.choices(WORDS, k=12))} for i in range(documents)]
        text.write_text("".join(json.dumps(line) + "\n" for line in lines))
        base = {"name": "a", "model": "dummy", "engine": "dummy", "placement": {"cpus": 1.0}}
        return recipe_from_dict(
            {
                "name": "t",
                "storage": str(tmp_path / storage),
                "corpus": {"source": str(text), "sequence_length": 128, "held_out": 0.1},
                "teachers": [{**base, **teacher} for teacher in teachers or ({},)],
                "capture": {"k": 4, "hidden_layers": [-1], "unit_sequences": 4, "quarantine_cap": 0.3, **capture},
            }
        )

    return make


def options(**more):
    return {"options": {"vocabulary": 300, **more}}


def store_of(recipe, teacher="a"):
    return Store.open(recipe.cache_uri(teacher))


def some_row(recipe, unit=2, row=1, split="train"):
    """A sequence id of that unit, which a first, clean preparation finds."""
    return (
        UnitList.open(CaptureTask.all_of(recipe, [recipe.teachers[0]])[0].cache.store)
        .read(f"{split}-{unit:05d}")
        .sequences[row]
        .sequence_id
    )


def score(recipe, timeouts=None):
    tasks = CaptureTask.all_of(recipe, recipe.teachers)
    pools = [create_pool(recipe, task, timeouts) for task in tasks]
    run_pools(pools)
    return pools[0]


def poisoned(make_recipe, fault, **more):
    row = some_row(make_recipe(options(), storage="clean"))
    return row, make_recipe({**options(**{f"{fault}_on": row}, **more), "replicas": 2})


def assert_only_that_row_is_missing(recipe, row):
    store = store_of(recipe)
    manifest = json.loads(store.read(MANIFEST_JSON))
    assert manifest["quarantined"] == 1
    assert manifest["rows"] == 39
    assert [entry.sequence_id for entry in quarantine.entries(store)] == [row]


def test_a_capture_commits_every_unit_and_is_found_done_afterwards(make_recipe, capsys):
    recipe = make_recipe(options())
    assert capture(recipe, recipe.teachers) is ExitCode.DONE
    manifest = store_of(recipe).read(MANIFEST_JSON)
    assert json.loads(manifest)["rows"] == 40
    assert capture(recipe, recipe.teachers) is ExitCode.DONE
    assert "done already" in capsys.readouterr().err
    assert store_of(recipe).read(MANIFEST_JSON) == manifest


def test_the_summary_has_throughput_bytes_and_bottleneck(make_recipe, capsys):
    recipe = make_recipe(options(delay_s_per_token=0.0005))
    capture(recipe, recipe.teachers)
    line = next(line for line in capsys.readouterr().err.splitlines() if "bottleneck" in line)
    assert "tokens/s" in line
    assert "bytes/token" in line
    assert "the teacher's engine" in line


def test_a_row_that_the_engine_refuses_is_quarantined_and_the_rest_is_done(make_recipe):
    row, recipe = poisoned(make_recipe, "row_error")
    assert capture(recipe, recipe.teachers) is ExitCode.INCOMPLETE
    assert_only_that_row_is_missing(recipe, row)
    assert "row refused" in quarantine.entries(store_of(recipe))[0].engine_message
    assert capture(recipe, recipe.teachers) is ExitCode.INCOMPLETE


def test_a_row_on_which_the_engine_raises_without_naming_it_is_found_by_bisection(make_recipe):
    row, recipe = poisoned(make_recipe, "error")
    assert capture(recipe, recipe.teachers) is ExitCode.INCOMPLETE
    assert_only_that_row_is_missing(recipe, row)
    assert "injected fault: error" in quarantine.entries(store_of(recipe))[0].engine_message


@pytest.mark.slow
def test_a_row_that_makes_the_engine_die_is_found_and_the_error_message_is_kept(make_recipe):
    row, recipe = poisoned(make_recipe, "dead")
    assert capture(recipe, recipe.teachers) is ExitCode.INCOMPLETE
    assert_only_that_row_is_missing(recipe, row)
    assert "engine died" in quarantine.entries(store_of(recipe))[0].engine_message


@pytest.mark.slow
def test_a_row_that_kills_the_process_is_found(make_recipe):
    row, recipe = poisoned(make_recipe, "kill")
    assert capture(recipe, recipe.teachers) is ExitCode.INCOMPLETE
    assert_only_that_row_is_missing(recipe, row)


@pytest.mark.slow
def test_a_row_that_hangs_the_engine_is_found_by_the_measured_timeout(make_recipe):
    row, recipe = poisoned(make_recipe, "hang")
    pool = score(recipe, Timeouts(tokens_per_item=512, floor_s=1.0, factor=3.0))
    assert_only_that_row_is_missing(recipe, row)
    assert pool.stats.quarantined == 1
    assert "did not answer" in quarantine.entries(store_of(recipe))[0].engine_message


@pytest.mark.slow
def test_an_engine_that_hangs_before_anything_is_done_is_noticed_by_the_speed_of_its_warm_up(make_recipe):
    clean = make_recipe(options(), storage="clean")
    rows = [some_row(clean, unit=0, row=0), some_row(clean, unit=0, row=0, split="held_out")]  # whichever comes first
    recipe = make_recipe(options(hang_on=",".join(rows)), unit_sequences=40)
    pool = create_pool(
        recipe, CaptureTask.all_of(recipe, [recipe.teachers[0]])[0], Timeouts(512, floor_s=2.0, first_store_s=0.0)
    )
    assert pool._timeouts.call_s() == 600.0
    started_s = time.monotonic()
    while not pool.stats.retries and time.monotonic() - started_s < 120:
        pool.tick()
        for ref in ray.wait(pool.refs(), timeout=0.2)[0]:
            pool.receive(ref)
    pool.shutdown()
    assert (pool.stats.items, pool.stats.retries, pool.failure) == (0, 1, None)
    assert pool._timeouts.call_s() < 30


def openings(log):
    return [int(line) for line in log.read_text().splitlines()]


@pytest.mark.slow
def test_an_engine_that_dies_while_it_opens_is_opened_again_in_another_process(make_recipe, tmp_path):
    log = tmp_path / "openings"
    recipe = make_recipe(options(openings=str(log), dead_openings=2))
    assert capture(recipe, recipe.teachers) is ExitCode.DONE
    assert len(openings(log)) == len(set(openings(log))) == 3


@pytest.mark.slow
def test_an_engine_that_never_opens_ends_the_run_with_its_error_message(make_recipe, tmp_path):
    log = tmp_path / "openings"
    recipe = make_recipe(options(openings=str(log), dead_openings=99))
    with pytest.raises(EngineError, match=r"6 engines in a row did not open; the last: .*engine died at opening 6$"):
        capture(recipe, recipe.teachers)
    assert len(openings(log)) == len(set(openings(log))) == 6


@pytest.mark.slow
def test_an_engine_that_always_dies_ends_the_run_with_its_cause(make_recipe):
    recipe = make_recipe({**options(dead_every=1), "replicas": 3})
    started_s = time.monotonic()
    with pytest.raises(EngineError, match="engine died"):
        score(recipe)
    assert time.monotonic() - started_s < 90


def test_a_replica_that_is_not_scheduled_in_an_idle_cluster_ends_the_run_with_its_cause(make_recipe):
    recipe = make_recipe({**options(), "placement": {"cpus": 1.0, "label_selector": {"zone": "nowhere"}}})
    with pytest.raises(EngineError, match="not scheduled within 0 s in an idle cluster"):
        score(recipe, Timeouts(tokens_per_item=512, schedule_s=0.2))


def test_a_replica_that_is_pending_while_others_work_is_not_given_up(make_recipe):
    slow = options(delay_s_per_token=0.0015)
    recipe = make_recipe(*({"name": name, **slow, "placement": {"cpus": 3.0}} for name in "ab"), documents=12)
    tasks = CaptureTask.all_of(recipe, recipe.teachers)
    pools = [create_pool(recipe, task, Timeouts(tokens_per_item=512, schedule_s=1.0)) for task in tasks]
    started_s = time.monotonic()
    run_pools(pools)
    assert time.monotonic() - started_s > 2 * 1.0
    assert [pool._budget._failed_starts for pool in pools] == [[], []]


def test_an_engine_that_cannot_open_ends_the_run_at_once(make_recipe):
    recipe = make_recipe(options(colour="red"))
    with pytest.raises(RecipeError, match="colour"):
        capture(recipe, recipe.teachers)


def test_past_the_cap_the_run_stops(make_recipe):
    recipe = make_recipe(options(error_every=1), quarantine_cap=0.1)
    with pytest.raises(EngineError, match="quarantine_cap"):
        capture(recipe, recipe.teachers)


def test_a_replica_that_does_not_fit_is_refused_before_it_is_created(make_recipe):
    recipe = make_recipe({**options(), "placement": {"cpus": 64.0}})
    with pytest.raises(RecipeError, match="64 CPU"):
        capture(recipe, recipe.teachers)


def test_teachers_that_do_not_fit_side_by_side_take_turns(make_recipe):
    teachers = [{"name": name, **options(seed=seed), "placement": {"cpus": 3.0}} for seed, name in enumerate("ab")]
    recipe = make_recipe(*teachers)
    assert capture(recipe, recipe.teachers) is ExitCode.DONE
    shards = [json.loads(store_of(recipe, name).read(MANIFEST_JSON)) for name in "ab"]
    assert [shard["rows"] for shard in shards] == [40, 40]
    assert shards[0]["commits"][0]["sequences_sha256"] == shards[1]["commits"][0]["sequences_sha256"]
    assert shards[0]["commits"][0]["sha256"] != shards[1]["commits"][0]["sha256"]


def test_of_failures_that_come_together_the_first_is_raised(make_recipe, monkeypatch):
    recipe, words = make_recipe(options()), iter(["first", "second"])
    pool = create_pool(recipe, CaptureTask.all_of(recipe, [recipe.teachers[0]])[0])

    def fail(replica, ref):
        raise EngineError(next(words))

    monkeypatch.setattr(pool, "_handle", fail)
    monkeypatch.setattr(pool, "_replicas", [SimpleNamespace(refs=lambda: ["one", "other"])])
    pool.receive("one")
    pool.receive("other")
    assert str(pool.failure) == "first"


def test_replicas_grow_with_the_queue_up_to_their_maximum(make_recipe, monkeypatch):
    recipe = make_recipe({**options(delay_s_per_token=0.008), "replicas": [1, 3]})
    task = CaptureTask.all_of(recipe, [recipe.teachers[0]])[0]
    pool = create_pool(recipe, task)
    seen = []
    tick = pool.tick
    monkeypatch.setattr(pool, "tick", lambda: (tick(), seen.append(len(pool._replicas))))
    run_pools([pool])
    assert seen[0] == 1
    assert max(seen) == 3


def create_one(pool):
    """Create a RUNNING replica without items; its process id."""
    pool._replicas.append(replica := Replica.create(pool.work, pool._placement, threads=1))
    while replica.state is not ReplicaState.RUNNING:
        for ref in ray.wait(replica.refs(), timeout=1)[0]:
            pool.receive(ref)
    return ray.get(replica.actor.location.remote()).pid


def kill_when(pool, ready, pid, killed):
    """Kill the process of the pool's only replica once it is `ready`; adds to `killed` how many items it had."""

    def kill():
        while pool._replicas and not pool.finished:
            if ready(pool._replicas[0]):
                killed.append(len(pool._replicas[0].items))
                os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.01)

    threading.Thread(target=kill, daemon=True).start()


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@pytest.mark.slow
def test_a_killed_replica_comes_back(make_recipe, busy):
    recipe = make_recipe({**options(delay_s_per_token=0.002), "replicas": 1})
    pool, killed = create_pool(recipe, CaptureTask.all_of(recipe, [recipe.teachers[0]])[0]), []
    pid = create_one(pool)
    if busy:
        kill_when(pool, lambda replica: bool(replica.items), pid, killed)
    else:
        assert not pool._replicas[0].items
        os.kill(pid, signal.SIGKILL)
    run_pools([pool])
    assert all(killed)
    assert len(killed) == busy
    assert pool.stats.retries >= 1
    assert json.loads(store_of(recipe).read(MANIFEST_JSON))["rows"] == 40


@pytest.mark.slow
def test_the_items_of_a_replica_that_ray_does_not_restart_go_to_another(make_recipe):
    recipe = make_recipe({**options(delay_s_per_token=0.004), "replicas": 2})
    pool, killed = create_pool(recipe, CaptureTask.all_of(recipe, [recipe.teachers[0]])[0]), []

    def kill_for_good():
        while not killed and not pool.finished:
            for replica in list(pool._replicas):
                if len(replica.items) == pool.work.calls_per_replica and not killed:
                    killed.append(replica.actor)
                    ray.kill(replica.actor, no_restart=True)
            time.sleep(0.01)

    threading.Thread(target=kill_for_good, daemon=True).start()
    run_pools([pool])
    assert len(killed) == 1
    assert pool.stats.retries >= pool.work.calls_per_replica - 1  # one may have been done just before
    assert json.loads(store_of(recipe).read(MANIFEST_JSON))["rows"] == 40


def test_an_item_that_is_tried_alone_gets_no_other_beside_it(make_recipe, monkeypatch):
    recipe = make_recipe(options())
    pool = create_pool(recipe, CaptureTask.all_of(recipe, [recipe.teachers[0]])[0])
    monkeypatch.setattr(pool.work, "submit", lambda actor, item: item.item_id)
    replicas = [Replica(actor=None, placement=None, state=ReplicaState.RUNNING) for _ in range(3)]
    monkeypatch.setattr(pool, "_replicas", replicas)
    for item in [pool.work.queue.pop(), pool.work.queue.pop()]:
        pool._searches.record_death(item, pool.work.row_ids, "killed", reported=False)
    pool._assign_items()
    assert sorted((replica.exclusive, len(replica.items)) for replica in replicas) == [(False, 3), (True, 1), (True, 1)]


def test_after_a_capture_all_resources_are_free_again(make_recipe):
    recipe = make_recipe({**options(), "replicas": 2})
    score_pending(recipe, [CaptureTask.all_of(recipe, [recipe.teachers[0]])[0]])
    deadline_s = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 4 and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 4


def test_a_failed_pool_ignores_the_results_that_are_still_in_flight():
    """They may come in one batch with the failure, when the readers that wait have got its error already."""
    pool = object.__new__(ReplicaPool)
    pool.failure = EngineError("the first failure")
    pool._replicas = [None]  # would raise if it were looked at
    pool.receive(object())
    assert str(pool.failure) == "the first failure"


def pool_of(*states, wanted=2, minimum=1):
    """A pool without Ray, whose replicas have these states and no items."""
    pool = object.__new__(ReplicaPool)
    pool._min_replicas = minimum
    pool._wanted_replicas = lambda: wanted
    pool._replicas = [SimpleNamespace(state=state, items={}) for state in states]
    pool._shut_down = pool._replicas.remove
    return pool


def test_only_a_pool_below_its_minimum_makes_others_release_idle_replicas():
    assert pool_of(ReplicaState.PENDING).lacks_resources()
    assert not pool_of(ReplicaState.RUNNING, ReplicaState.PENDING).lacks_resources()
    assert pool_of(ReplicaState.RUNNING, ReplicaState.PENDING, minimum=2).lacks_resources()
    assert not pool_of(ReplicaState.RUNNING).lacks_resources()


def test_idle_replicas_that_are_ready_are_released_last():
    pool = pool_of(ReplicaState.RUNNING, ReplicaState.STARTING, ReplicaState.PENDING, wanted=1)
    pool.release_idle()
    assert [replica.state for replica in pool._replicas] == [ReplicaState.RUNNING]
