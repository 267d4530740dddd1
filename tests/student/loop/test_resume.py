import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pipeline.cache.storage.store import Store
from pipeline.errors import TrainingError
from student.loop.checkpoint import Snapshot, save_checkpoint
from student.loop.fault_points import ENVIRONMENT_KEY
from student.loop.resume import load_latest_on_all_ranks
from student.loop.worker import RunCallbacks, train_rank
from student.loop.worker_group import WorkerGroup
from student.train import claim_folder, training_identity
from student.training_job import TrainingJob

FORK = multiprocessing.get_context("fork")


def fork_ranks(work, world_size, folder):
    """Call `work(group)` in `world_size` processes of one gloo group; their exit codes."""

    def rank(number):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=number, world_size=world_size)
        work(WorkerGroup(number, world_size))
        dist.destroy_process_group()

    rendezvous = folder / f"rendezvous-{os.urandom(4).hex()}"
    processes = [FORK.Process(target=rank, args=(number,), daemon=True) for number in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def start_ranks(job, world_size, folder, faults=()):
    """Train in several processes, as Ray Train does, without Ray; their exit codes."""

    def work(group):
        if faults:
            os.environ[ENVIRONMENT_KEY] = faults[0]
        train_rank(job, group, RunCallbacks(on_checkpoint=lambda _: None, on_step=lambda _: None))

    claim_folder(job, training_identity(job, job.caches()))
    return fork_ranks(work, world_size, folder)


def outcome(job):
    folder = job.store.local_path()
    return (folder / "final/model.safetensors").read_bytes(), (folder / "log.jsonl").read_bytes()


def fresh(run, name, **changes):
    values = run.values(**changes)
    values["storage"] = str(run.folder / name)
    (run.folder / name).mkdir(exist_ok=True)
    if not (run.folder / name / "caches").exists():
        (run.folder / name / "caches").symlink_to(run.folder / "run" / "caches")
    return TrainingJob.from_json({"recipe": values, "student": "student"})


@pytest.fixture(scope="module")
def undisturbed(start, run_in, tmp_path_factory):
    job = fresh(run_in(tmp_path_factory.mktemp("undisturbed")), "undisturbed")
    assert start(job) == 0
    return outcome(job)


@pytest.mark.parametrize(
    ("point", "step"),
    [
        ("before_step", 0),
        ("mid_step", 4),
        ("after_step", 2),
        ("after_step", 6),
        ("mid_checkpoint", 3),
        ("before_marker", 6),
        ("after_marker", 6),
    ],
)
def test_a_killed_training_resumes_to_the_same_bits(start, small_run, undisturbed, point, step):
    job = fresh(small_run, "killed")
    flag = small_run.folder / "flag"
    assert start(job, f"{point}:{step}:0:{flag}") == -signal.SIGKILL
    assert flag.exists()
    assert not job.store.exists("train.json")
    assert start(job) == 0
    assert outcome(job) == undisturbed


@pytest.mark.parametrize(
    ("point", "step", "is_finished"),
    [
        ("mid_final", 8, False),
        ("before_record", 8, False),
        ("after_record", 8, True),
        ("mid_clear", 6, True),
    ],
)
def test_a_training_killed_while_it_finishes_resumes_to_the_same_bits_and_leaves_no_checkpoint(
    start, small_run, undisturbed, point, step, is_finished
):
    job = fresh(small_run, "killed")
    flag = small_run.folder / "flag"
    assert start(job, f"{point}:{step}:0:{flag}") == -signal.SIGKILL
    assert flag.exists()
    assert job.store.exists("train.json") == is_finished
    assert start(job) == 0
    assert outcome(job) == undisturbed
    assert job.store.list("checkpoints") == []


def test_a_training_killed_while_it_resumes_resumes_to_the_same_bits(start, small_run, undisturbed):
    job = fresh(small_run, "killed")
    assert start(job, f"after_marker:3:0:{small_run.folder / 'flag'}") == -signal.SIGKILL
    flag = small_run.folder / "flag-again"
    assert start(job, f"mid_resume:3:0:{flag}") == -signal.SIGKILL
    assert flag.exists()
    assert start(job) == 0
    assert outcome(job) == undisturbed


def load_on_ranks(stores, folder):
    """Result of every rank, where rank i reads the i-th store."""
    results = FORK.SimpleQueue()

    def work(group):
        try:
            latest = load_latest_on_all_ranks(stores[group.rank], group)
            results.put((group.rank, None if latest is None else (latest.step, latest.progress)))
        except TrainingError as error:
            results.put((group.rank, str(error)))
        group.barrier()

    assert fork_ranks(work, len(stores), folder) == [0] * len(stores)
    by_rank = dict(results.get() for _ in stores)
    return [by_rank[rank] for rank in range(len(stores))]


def saved(store, step, state):
    save_checkpoint(store, Snapshot(step, {"by": state}, {"model": {"weight": torch.ones(2)}}))


def test_every_rank_resumes_from_the_latest_checkpoint_of_rank_0(tmp_path):
    stores = [Store.open(tmp_path / name) for name in ("a", "b")]
    assert load_on_ranks(stores, tmp_path) == [None, None]
    for store in stores:
        saved(store, 3, "both")
    saved(stores[1], 6, "the second alone")
    assert load_on_ranks(stores, tmp_path) == [(3, {"by": "both"})] * 2
    saved(stores[0], 6, "the first alone")
    first, second = load_on_ranks(stores, tmp_path)
    assert first == (6, {"by": "the first alone"})
    assert "expected the whole.json that rank 0 has read" in second


def test_an_incomplete_checkpoint_is_skipped_with_one_line_and_the_one_before_is_loaded(
    start, small_run, undisturbed, capfd
):
    job = fresh(small_run, "killed")
    assert start(job, f"before_marker:6:0:{small_run.folder / 'flag'}") == -signal.SIGKILL
    capfd.readouterr()
    assert start(job) == 0
    printed = capfd.readouterr().err.splitlines()
    assert sum("step-00000006: incomplete (no whole.json); skipped" in line for line in printed) == 1
    assert "student: resumes after step 3" in printed
    assert outcome(job) == undisturbed


def test_a_training_killed_in_every_step_resumes_to_the_same_bits(start, small_run, undisturbed):
    job = fresh(small_run, "killed")
    for step in range(8):
        start(job, f"after_step:{step}:0:{small_run.folder / f'flag-{step}'}")
    assert start(job) == 0
    assert outcome(job) == undisturbed


def test_timing_has_one_line_per_step_after_a_resume(start, small_run):
    job = fresh(small_run, "killed")
    start(job, f"after_step:5:0:{small_run.folder / 'flag'}")
    assert start(job) == 0
    folder = job.store.local_path()
    steps = [json.loads(line)["step"] for line in (folder / "timing.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_world_size_trains_the_same_student(small_run, undisturbed, world):
    job = fresh(small_run, f"world-{world}")
    assert start_ranks(job, world, small_run.folder) == [0] * world
    assert_near(job, undisturbed)


def assert_near(job, expected, *, atol=2e-4, rtol=1e-4):
    log = outcome(job)[1]
    for line, expected_line in zip(log.splitlines(), expected[1].splitlines(), strict=True):
        got, wanted = json.loads(line), json.loads(expected_line)
        assert {key: got[key] for key in ("step", "tokens", "epoch")}.items() <= wanted.items()
        assert got["loss"] == pytest.approx(wanted["loss"], rel=rtol)
    (job.store.local_path() / "expected.safetensors").write_bytes(expected[0])
    expected_weights = load_file(job.store.local_path() / "expected.safetensors")
    for name, tensor in load_file(job.store.local_path() / "final/model.safetensors").items():
        assert tensor.allclose(expected_weights[name], atol=atol), name


@pytest.mark.slow
def test_the_world_size_may_change_with_every_resume(small_run, undisturbed):
    job = fresh(small_run, "elastic", checkpoint_every_steps=1)
    for step, world in ((2, 1), (4, 2), (6, 4)):
        flag = small_run.folder / f"flag-{step}"
        codes = start_ranks(job, world, small_run.folder, [f"after_step:{step}:0:{flag}"])
        assert codes[0] == -signal.SIGKILL
    assert start_ranks(job, 3, small_run.folder) == [0, 0, 0]
    assert_near(job, undisturbed)


@pytest.mark.slow
def test_a_training_with_a_killed_rank_resumes_to_the_same_bits(small_run):
    expected = fresh(small_run, "two")
    assert start_ranks(expected, 2, small_run.folder) == [0, 0]
    job = fresh(small_run, "two-killed")
    start_ranks(job, 2, small_run.folder, [f"mid_step:4:1:{small_run.folder / 'flag'}"])
    assert Path(small_run.folder / "flag").exists()
    assert not job.store.exists("train.json")
    assert start_ranks(job, 2, small_run.folder) == [0, 0]
    assert outcome(job) == outcome(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "atol", "rtol"),
    [
        ({"lora": {"rank": 2}}, 2e-4, 1e-4),
        ({"activation_checkpointing": True, "freeze": ["model.embed_tokens"]}, 2e-4, 1e-4),
        ({"dtype": "bfloat16"}, 5e-3, 5e-3),
    ],
    ids=["lora", "checkpointed and frozen", "bfloat16"],
)
def test_fsdp2_trains_the_same_student_with_other_settings(start, small_run, changes, atol, rtol):
    alone = fresh(small_run, "alone", max_steps=4, **changes)
    assert start(alone) == 0
    sharded = fresh(small_run, "sharded", max_steps=4, parallel="fsdp2", **changes)
    assert start_ranks(sharded, 2, small_run.folder) == [0, 0]
    assert_near(sharded, outcome(alone), atol=atol, rtol=rtol)


@pytest.mark.slow
def test_fsdp2_trains_the_same_student_and_resumes_with_ddp(start, small_run, undisturbed):
    job = fresh(small_run, "fsdp2", parallel="fsdp2")
    assert start_ranks(job, 2, small_run.folder, [f"after_step:5:0:{small_run.folder / 'flag'}"])[0] < 0
    assert start_ranks(job, 2, small_run.folder) == [0, 0]
    assert_near(job, undisturbed)
    mixed = fresh(small_run, "fsdp2-then-ddp", parallel="fsdp2")
    assert start_ranks(mixed, 2, small_run.folder, [f"after_step:4:0:{small_run.folder / 'flag-mixed'}"])[0] < 0
    assert start(fresh(small_run, "fsdp2-then-ddp", parallel="ddp")) == 0
    assert_near(mixed, undisturbed)
