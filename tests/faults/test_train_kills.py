"""Training ranks killed at every fault point, in gloo processes and on Ray Train: the same bits after a resume."""

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


def load(name):
    """Import a file of the student's tests as a module, for its fixtures and functions."""
    path = Path(__file__).parents[1] / "student" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"train_kills_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


student_conftest, resume_tests = load("conftest"), load("loop/test_resume")
filled, run_in = student_conftest.filled, student_conftest.run_in
small_run, empty_run = student_conftest.small_run, student_conftest.empty_run
STEPPING = ("before_step", "mid_step", "after_step")
SAVING = ("mid_checkpoint", "before_marker", "after_marker")
ENDING = ("mid_final", "before_record", "after_record", "mid_clear")
STEPS = 8


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_a_rank_killed_at_any_point_of_a_step_resumes_to_the_same_bits(small_run):
    expected = resume_tests.fresh(small_run, "undisturbed")
    assert resume_tests.start_ranks(expected, 2, small_run.folder) == [0, 0]
    killed = Counter()
    for point, step, rank in itertools.product((*STEPPING, *SAVING), (0, 2, 3, 6, 7), (0, 1)):
        if point in SAVING and (rank != 0 or step not in (3, 6)):
            continue
        job = resume_tests.fresh(small_run, f"{point}-{step}-{rank}")
        flag = small_run.folder / f"flag-{point}-{step}-{rank}"
        resume_tests.start_ranks(job, 2, small_run.folder, [f"{point}:{step}:{rank}:{flag}"])
        assert flag.exists(), (point, step, rank)
        # Rank 0 may finish alone once the last step's sums are reduced.
        may_be_finished = (point, step, rank) == ("after_step", 7, 1)
        assert may_be_finished or not job.store.exists("train.json"), (point, step, rank)
        assert resume_tests.start_ranks(job, 2, small_run.folder) == [0, 0]
        assert resume_tests.outcome(job) == resume_tests.outcome(expected), (point, step, rank)
        killed[point] += 1
    print(f"processes killed: {dict(killed)}")
    assert sum(killed.values()) == 36


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_rank_killed_while_it_resumes_or_finishes_resumes_to_the_same_bits(small_run):
    expected = resume_tests.fresh(small_run, "undisturbed")
    assert resume_tests.start_ranks(expected, 2, small_run.folder) == [0, 0]
    killed = Counter()
    kills = [
        ("mid_resume", 3, 0),
        ("mid_resume", 3, 1),
        *((point, STEPS, 0) for point in ENDING[:3]),
        (ENDING[3], 6, 0),
    ]
    assert {point for point, _, _ in kills} == {*POINTS} - {*STEPPING, *SAVING}
    for point, step, rank in kills:
        job = resume_tests.fresh(small_run, f"{point}-{rank}")
        if point == "mid_resume":
            resume_tests.start_ranks(
                job, 2, small_run.folder, [f"after_marker:3:0:{small_run.folder / f'before-{rank}'}"]
            )
        flag = small_run.folder / f"flag-{point}-{rank}"
        resume_tests.start_ranks(job, 2, small_run.folder, [f"{point}:{step}:{rank}:{flag}"])
        assert flag.exists(), (point, step, rank)
        assert job.store.exists("train.json") == (point in ("after_record", "mid_clear"))
        if job.store.exists("train.json"):
            assert student_conftest.start(job) == 0
        else:
            assert resume_tests.start_ranks(job, 2, small_run.folder) == [0, 0]
        assert resume_tests.outcome(job) == resume_tests.outcome(expected), (point, step, rank)
        assert job.store.list("checkpoints") == []
        killed[point] += 1
    print(f"processes killed: {dict(killed)}")
    assert sum(killed.values()) == 6


ONE_THEN_TWO = """
import sys
from pipeline.config import ClusterSpec
from pipeline.run.ray_session import ray_session
from student.loop import ray_trainer
from student.train import main

with ray_session(ClusterSpec(), local_cpus=2):
    attempts, ray_trainer.ATTEMPTS = ray_trainer.ATTEMPTS, 1
    assert main([sys.argv[1]]) == 1
    print("one worker has failed", file=sys.stderr)
    ray_trainer.ATTEMPTS = attempts
    assert main([sys.argv[2]]) == 0
"""
"""Two training jobs in one Ray cluster; the first ends when its worker dies."""


@pytest.fixture
def large_run(empty_run):
    """A run whose teacher is much larger than the memory that a rank may use; recipe settings; bytes of the teacher."""
    teacher_bytes = student_conftest.write_large_teacher(empty_run.folder / "teacher")
    teacher = {"name": "large", "model": str(empty_run.folder / "teacher"), "engine": "dummy"}
    settings = {"teachers": [teacher], "student": {"from_teacher": "large", "layers": [0]}}
    empty_run.fill(empty_run.recipe(**settings))
    return empty_run, settings, teacher_bytes


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_killed_on_ray_with_one_and_then_two_workers_gives_the_same_bits_and_loads_no_teacher(large_run):
    run, settings, teacher_bytes = large_run
    faults = [f"after_marker:3:0:{run.folder / name}" for name in ("flag", "flag-on-ray")]
    expected = resume_tests.fresh(run, "ranks", **settings)
    assert resume_tests.start_ranks(expected, 1, run.folder, faults[:1]) == [-signal.SIGKILL]
    assert resume_tests.start_ranks(expected, 2, run.folder) == [0, 0]

    one_worker, two_workers = (resume_tests.fresh(run, "ray", **settings, workers=workers) for workers in (1, 2))
    job_files = [run.folder / "one.json", run.folder / "two.json"]
    for path, job in zip(job_files, (one_worker, two_workers), strict=True):
        path.write_text(json.dumps(job.to_json()))
    two_workers.store.put("ray/old/checkpoint_manager_snapshot.json", b'{"checkpoint_')
    flag = run.folder / "flag-again"
    environment = os.environ | {ENVIRONMENT_KEY: f"{faults[1]} mid_step:5:1:{flag}"}
    command = [sys.executable, "-c", ONE_THEN_TWO, *map(str, job_files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run.folder / "flag-on-ray").exists()
    assert flag.exists()
    before, after = done.stderr.split("one worker has failed\n")
    assert "attempt 1 of 1 failed" in before
    warnings = [line for line in before.splitlines() if "ray/old/checkpoint_manager_snapshot.json" in line]
    assert len(warnings) == 1
    assert "truncated record of Ray Train; deleted" in warnings[0]
    assert "student: attempt 1 of 3 failed" in after
    assert after.count("student: resumes after step 3") == 2
    assert "student: 8/8 steps" in after
    assert not two_workers.store.list("ray")
    assert resume_tests.outcome(two_workers) == resume_tests.outcome(expected)

    record = json.loads(two_workers.store.read("train.json"))
    assert record["world"] == len(record["ranks"]) == 2
    for rank in record["ranks"]:
        assert rank["modules"] == ["ray", "torch", "transformers"]
        assert 0 < rank["peak_rss_bytes"] - rank["bare_rss_bytes"] < teacher_bytes / 2
