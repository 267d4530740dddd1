"""The driver's memory does not grow with the number of units; a machine short of memory ends a run with that cause.

100,000 units are more than a test has time to score and to store, so two pairs of runs tell the story: 100 and 3,000
units in which nothing is replaced, and 100 and 100,000 units in which the preparation, Ray, the crew and its
ledger are the real ones, but the replicas answer at once and commit nothing.
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
HOLLOW = """
import sys
from actors import crew
from actors.capture import Task, make_crew, read_job
from pipeline.run.ray_session import ray_session
from actors.faithfulness import Comparison
from actors.lease import Arrival, Lease, Outcome
from actors.supervise import supervise

class Hollow:
    def __init__(self, posting): pass
    def arrive(self): return Arrival(0, "")
    def open(self): pass
    def warm_up(self): return Outcome("warm-up", tokens=8, score_s=0.001)
    def capture(self, lease): return Outcome(lease.unit_id, rows=1, tokens=8, stored_bytes=800, score_s=0.001)
    def finish(self, lease): return (Lease("train-00000", check=True),)
    def check(self, lease): return Comparison(8)
    def close(self): pass

crew.Teacher = Hollow
recipe, (teacher,) = read_job(sys.argv[1:])
task = Task.of(recipe, teacher)
with ray_session(recipe.cluster):
    supervise([made := make_crew(recipe, task)])
assert made.ledger.units == len(task.pending) == len(task.cache.unit_ids)
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
@pytest.mark.parametrize(("script", "units"), [(DRIVER, 3000), (HOLLOW, 100_000)], ids=["whole", "hollow-replicas"])
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
