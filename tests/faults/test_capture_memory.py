"""The driver's memory does not grow with the number of units; a machine short of memory ends a run with that cause.

100,000 units are more than a test has time to score and to store, so two pairs of runs are compared: 100 and 3,000
units with nothing replaced, and 100 and 100,000 units with real preparation, Ray and pool, but with actors that return
at once and commit nothing.
"""

import json
import os
import re
import subprocess
import sys

import pytest

from pipeline.config import recipe_from_dict

GROWTH_BYTES = 48 * 2**20
"""What a run of any size may take above one of 100 units: the largest file of the plan that is written, and noise."""
PEAK = """
with open("/proc/self/status") as status:  # getrusage's peak counts what the parent held before it forked
    print("peak", next(line.split()[1] for line in status if line.startswith("VmHWM:")))
"""
DRIVER = """
import sys
from actors.capture import main
assert main(sys.argv[1:]) == 0
"""
MOCKED_ACTORS = """
import sys
from actors.capture import CaptureTask, create_pool, recipe_and_teachers
from actors.checks.faithfulness import Comparison
from actors.replicas.pool import run_pools
from actors.replicas.work import ReplicaLocation, WorkItem, WorkResult
from actors.scoring import scoring_work
from pipeline.run.job_process import read_job_file
from pipeline.run.ray_session import ray_session

class MockActor:
    def __init__(self, config): pass
    def location(self): return ReplicaLocation(0, "")
    def open(self): pass
    def warm_up(self): return WorkResult("warm-up", tokens=8, engine_s=0.001)
    def capture(self, item): return WorkResult(item.item_id, rows=1, tokens=8, stored_bytes=800, engine_s=0.001)
    def finish(self, item): return (WorkItem("train-00000", "check"),)
    def check(self, item): return Comparison(8)
    def close(self): pass

scoring_work.TeacherActor = MockActor
recipe, (teacher,) = recipe_and_teachers(read_job_file(sys.argv[1:]))
task = CaptureTask.all_of(recipe, [teacher])[0]
with ray_session(recipe.cluster):
    run_pools([pool := create_pool(recipe, task)])
assert pool.stats.items == len(task.pending) == len(task.cache.unit_ids)
"""


def write_job(folder, units):
    folder.mkdir()
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"id": f"d{i}", "text": f"row {i}"}) + "\n" for i in range(units)))
    recipe = recipe_from_dict(
        {
            "name": "t",
            "storage": str(folder / "run"),
            "cluster": {"cpus": 2},
            "corpus": {"source": str(text), "sequence_length": 64},
            "teachers": [
                {"name": "a", "model": "dummy", "engine": "dummy", "replicas": 2, "options": {"vocabulary": 300}}
            ],
            "capture": {"k": 2, "unit_sequences": 1},
        }
    )
    job = folder / "job.json"
    job.write_text(json.dumps({"recipe": recipe.to_dict(), "teacher": None}))
    return job


def peak_bytes(script, job):
    done = subprocess.run(
        [sys.executable, "-c", script + PEAK, str(job)], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stdout + done.stderr
    peak = re.search(r"^peak (\d+)$", done.stdout, re.MULTILINE)
    assert peak is not None
    return int(peak.group(1)) * 1024


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("script", "units"), [(DRIVER, 3000), (MOCKED_ACTORS, 100_000)], ids=["nothing-replaced", "mock-actors"]
)
def test_the_drivers_memory_is_flat_from_100_units_on(tmp_path, script, units):
    few, many = (peak_bytes(script, write_job(tmp_path / str(number), number)) for number in (100, units))
    print(f"driver's peak: {few / 2**20:.0f} MiB with 100 units, {many / 2**20:.0f} MiB with {units:,}")
    assert many - few < GROWTH_BYTES


@pytest.mark.slow
def test_replicas_that_are_killed_for_memory_while_they_start_end_the_run_with_that_cause(tmp_path):
    environment = {**os.environ, "RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"}
    job = write_job(tmp_path / "short", units=4)
    done = subprocess.run(
        [sys.executable, "-m", "actors.capture", str(job)],
        capture_output=True, text=True, check=False, env=environment, timeout=280,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "error: teacher a: 7 engines in a row did not open; the last: killed for memory: " in done.stderr
