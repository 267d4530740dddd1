"""Training ranks killed at any point, with gloo on this machine and with Ray Train: the result is equal bit by bit."""

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from student.loop.fault_points import ENVIRONMENT_KEY, POINTS


def student_tests(name):
    """Import a file of the student's tests for its fixtures and the functions that start ranks."""
    path = Path(__file__).parents[1] / "student" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"train_kills_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


small, ranks = student_tests("conftest"), student_tests("test_resume")
filled, run_in, small_run, empty_run = small.filled, small.run_in, small.small_run, small.empty_run
STEPPING = ("before_step", "mid_step", "after_step")
SAVING = ("mid_checkpoint", "before_marker", "after_marker")
ENDING = ("mid_final", "before_record", "after_record", "mid_clear")
STEPS = 8


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_every_rank_at_every_point_of_every_kind_of_step(small_run):
    expected = ranks.fresh(small_run, "undisturbed")
    assert ranks.start_ranks(expected, 2, small_run.folder) == [0, 0]
    killed = Counter()
    for point, step, rank in itertools.product((*STEPPING, *SAVING), (0, 2, 3, 6, 7), (0, 1)):
        if point in SAVING and (rank != 0 or step not in (3, 6)):
            continue
        job = ranks.fresh(small_run, f"{point}-{step}-{rank}")
        flag = small_run.folder / f"killed-{point}-{step}-{rank}"
        ranks.start_ranks(job, 2, small_run.folder, [f"{point}:{step}:{rank}:{flag}"])
        assert flag.exists(), (point, step, rank)
        # After the all-reduce of the last step, rank 0 does not need the other rank.
        may_be_finished = (point, step, rank) == ("after_step", 7, 1)
        assert may_be_finished or not job.store.exists("train.json"), (point, step, rank)
        assert ranks.start_ranks(job, 2, small_run.folder) == [0, 0]
        assert ranks.outcome(job) == ranks.outcome(expected), (point, step, rank)
        killed[point] += 1
    print(f"kills: {dict(killed)}")
    assert sum(killed.values()) == 36


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_every_rank_while_it_resumes_and_rank_0_while_it_finishes(small_run):
    expected = ranks.fresh(small_run, "undisturbed")
    assert ranks.start_ranks(expected, 2, small_run.folder) == [0, 0]
    killed = Counter()
    kills = [
        ("mid_resume", 3, 0),
        ("mid_resume", 3, 1),
        *((point, STEPS, 0) for point in ENDING[:3]),
        (ENDING[3], 6, 0),
    ]
    assert {point for point, _, _ in kills} == {*POINTS} - {*STEPPING, *SAVING}
    for point, step, rank in kills:
        job = ranks.fresh(small_run, f"{point}-{rank}")
        if point == "mid_resume":
            ranks.start_ranks(job, 2, small_run.folder, [f"after_marker:3:0:{small_run.folder / f'before-{rank}'}"])
        flag = small_run.folder / f"killed-{point}-{rank}"
        ranks.start_ranks(job, 2, small_run.folder, [f"{point}:{step}:{rank}:{flag}"])
        assert flag.exists(), (point, step, rank)
        assert job.store.exists("train.json") == (point in ("after_record", "mid_clear"))
        if job.store.exists("train.json"):
            assert small.start(job) == 0
        else:
            assert ranks.start_ranks(job, 2, small_run.folder) == [0, 0]
        assert ranks.outcome(job) == ranks.outcome(expected), (point, step, rank)
        assert job.store.list("checkpoints") == []
        killed[point] += 1
    print(f"kills: {dict(killed)}")
    assert sum(killed.values()) == 6


ONE_THEN_TWO = """
import sys
from pipeline.config import ClusterSpec
from pipeline.run.ray_session import ray_session
from student import on_ray
from student.train import main

with ray_session(ClusterSpec(), local_cpus=2):
    attempts, on_ray.ATTEMPTS = on_ray.ATTEMPTS, 1
    assert main([sys.argv[1]]) == 1
    print("one worker has failed")
    on_ray.ATTEMPTS = attempts
    assert main([sys.argv[2]]) == 0
"""
"""Two training jobs, one after the other in the same Ray session; the first fails when its worker dies."""


@pytest.fixture
def large_run(empty_run):
    """A run whose teacher is far larger than the memory that a rank may take; its settings, and the teacher's bytes."""
    teacher_bytes = small.write_large_teacher(empty_run.folder / "teacher")
    teacher = {"name": "large", "model": str(empty_run.folder / "teacher"), "engine": "dummy"}
    settings = {"teachers": [teacher], "student": {"from_teacher": "large", "layers": [0]}}
    empty_run.fill(empty_run.recipe(**settings))
    return empty_run, settings, teacher_bytes


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_on_ray_one_worker_and_then_two_train_the_same_and_none_holds_an_engine_or_a_teacher(large_run):
    run, settings, teacher_bytes = large_run
    faults = [f"after_marker:3:0:{run.folder / name}" for name in ("killed", "killed-on-ray")]
    expected = ranks.fresh(run, "ranks", **settings)
    assert ranks.start_ranks(expected, 1, run.folder, faults[:1]) == [-signal.SIGKILL]
    assert ranks.start_ranks(expected, 2, run.folder) == [0, 0]

    one, job = (ranks.fresh(run, "ray", **settings, workers=workers) for workers in (1, 2))
    jobs = [run.folder / "one.json", run.folder / "two.json"]
    for path, written in zip(jobs, (one, job), strict=True):
        path.write_text(json.dumps(written.to_json()))
    job.store.put("ray/old/checkpoint_manager_snapshot.json", b'{"checkpoint_')
    flag = run.folder / "killed-again"
    environment = os.environ | {ENVIRONMENT_KEY: f"{faults[1]} mid_step:5:1:{flag}"}
    command = [sys.executable, "-c", ONE_THEN_TWO, *map(str, jobs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run.folder / "killed-on-ray").exists()
    assert flag.exists()
    before, after = done.stdout.split("one worker has failed\n")
    assert "attempt 1 of 1 ended early" in before
    deleted = [line for line in before.splitlines() if "ray/old/checkpoint_manager_snapshot.json" in line]
    assert len(deleted) == 1
    assert "cut off; deleted" in deleted[0]
    assert "student: attempt 1 of 3 ended early" in after
    assert after.count("student: goes on after step 3") == 2
    assert "student step 8/8" in after
    assert not job.store.list("ray")
    assert ranks.outcome(job) == ranks.outcome(expected)

    record = json.loads(job.store.read("train.json"))
    assert record["world"] == len(record["ranks"]) == 2
    for rank in record["ranks"]:
        assert rank["modules"] == ["ray", "torch", "transformers"]
        assert 0 < rank["peak_rss_bytes"] - rank["bare_rss_bytes"] < teacher_bytes / 2
