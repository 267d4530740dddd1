"""The driver's memory does not grow with the number of units; a machine short of memory ends a run with that cause."""

import json
import os
import re
import subprocess
import sys

import pytest

from pipeline.config import recipe_from

GROWTH_BYTES_PER_UNIT = 2048
"""A unit's id and its entry in the unit list's index; a unit itself is far larger, and so is its commit."""
DRIVER = """
import json, resource, sys
from actors.capture import main
code = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


def write_job(folder, units):
    folder.mkdir()
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"id": f"d{i}", "text": f"row {i}"}) + "\n" for i in range(units)))
    recipe = recipe_from(
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
    job.write_text(json.dumps({"recipe": recipe.resolved(), "teacher": None}))
    return job


def peak_bytes(job):
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(job)], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    peak = re.search(r"^peak (\d+)$", done.stdout, re.MULTILINE)
    assert peak is not None
    return int(peak.group(1))


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_the_drivers_memory_is_flat_from_100_to_10000_units(tmp_path):
    few, many = (peak_bytes(write_job(tmp_path / str(units), units)) for units in (100, 10_000))
    print(f"driver's peak: {few / 2**20:.0f} MiB with 100 units, {many / 2**20:.0f} MiB with 10,000")
    assert many - few < GROWTH_BYTES_PER_UNIT * 9_900


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
