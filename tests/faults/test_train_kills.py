"""Training ranks that die at any point, on this machine's gloo and on real Ray Train: no bit of the outcome changes."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from student.faults import POINTS


def rooms(name):
    """A file of the student's tests, as a module: its fixtures and its ways to start ranks."""
    path = Path(__file__).parents[1] / "student" / "job" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"train_kills_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


small, ranks = rooms("conftest"), rooms("test_resume")
filled, small_run = small.filled, small.small_run
SAVING = ("mid_checkpoint", "before_marker", "after_marker")


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_every_rank_at_every_point_of_every_kind_of_step(small_run):
    expected = ranks.fresh(small_run, "undisturbed")
    assert ranks.start_ranks(expected, 2, small_run.folder) == [0, 0]
    struck = Counter()
    for point, step, rank in itertools.product(POINTS, (0, 2, 3, 6, 7), (0, 1)):
        if point in SAVING and (rank != 0 or step not in (3, 6)):
            continue
        told = ranks.fresh(small_run, f"{point}-{step}-{rank}")
        flag = small_run.folder / f"struck-{point}-{step}-{rank}"
        ranks.start_ranks(told, 2, small_run.folder, [f"{point}:{step}:{rank}:{flag}"])
        assert flag.exists(), (point, step, rank)
        # Once the last step's sums are shared, the leading rank needs nobody any more.
        may_be_finished = (point, step, rank) == ("after_step", 7, 1)
        assert may_be_finished or not told.store.exists("train.json"), (point, step, rank)
        assert ranks.start_ranks(told, 2, small_run.folder) == [0, 0]
        assert ranks.outcome(told) == ranks.outcome(expected), (point, step, rank)
        struck[point] += 1
    print(f"kills that landed: {dict(struck)}")
    assert sum(struck.values()) == 36


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_that_dies_on_ray_is_started_anew_whatever_records_ray_left(small_run):
    expected = ranks.fresh(small_run, "undisturbed")
    assert ranks.start_ranks(expected, 2, small_run.folder) == [0, 0]
    told = ranks.fresh(small_run, "killed", workers=2)
    told.store.put("ray/old/checkpoint_manager_snapshot.json", b'{"checkpoint_')
    flag = small_run.folder / "struck"
    job = small_run.folder / "job.json"
    job.write_text(json.dumps(told.to_json()))
    environment = os.environ | {"STILLHOUSE_TRAIN_FAULT": f"mid_step:5:1:{flag}"}
    command = [sys.executable, "-m", "student.train", str(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert flag.exists()
    assert "student: attempt 1 of 3 ended early" in done.stdout
    assert "student: goes on after step 3" in done.stdout
    assert ranks.outcome(told) == ranks.outcome(expected)
