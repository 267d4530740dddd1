"""The main job from recipe to table with the dummy engine: every stage is the real one, its capture on real Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from pipeline.cache.reader import CacheReader

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# tests/test_real_thing.py trains on Ray's workers, and takes its time for it; the epochs leave time for an interrupt.
HERE = ["training.workers=0", "training.epochs=4"]
RUN = ["run", "dummy", *HERE]
STILLHOUSE = [sys.executable, "-m", "pipeline.run.cli"]


def stillhouse(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*STILLHOUSE, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=560
    )


class Interrupted(NamedTuple):
    folder: Path
    exit_code: int
    output: str
    left: set[str]
    """Which of the records that a finished training leaves were there when the run had ended."""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """A run whose training, and nothing else, gets a SIGINT behind its first checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen([*STILLHOUSE, *RUN], cwd=folder, **pipes, text=True)
    student, deadline_s = folder / "runs/dummy/students/student", time.monotonic() + 240
    while not list(student.glob("checkpoints/*/whole.json")):
        assert time.monotonic() < deadline_s, "no checkpoint was written"
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.05)
    (job,) = psutil.Process(process.pid).children()
    job.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    records = [folder / "runs/dummy/jobs/train-student.json", student / "train.json"]
    return Interrupted(folder, process.returncode, output, {path.name for path in records if path.exists()})


@pytest.fixture(scope="module")
def finished(interrupted: Interrupted) -> Path:
    """The same run, started again."""
    done = stillhouse(interrupted.folder, *RUN)
    assert done.returncode == 0, done.stdout + done.stderr
    (interrupted.folder / "stdout.txt").write_text(done.stdout)
    (interrupted.folder / "stderr.txt").write_text(done.stderr)
    return interrupted.folder


def test_an_interrupt_of_the_training_alone_ends_the_run_and_the_next_start_finishes_it(
    interrupted: Interrupted, finished: Path
) -> None:
    assert interrupted.exit_code == 130, interrupted.output
    assert interrupted.left == set()
    assert "student: resumes after step" in (finished / "stderr.txt").read_text()
    assert "bits per byte" in (finished / "stdout.txt").read_text()


def test_the_run_ends_with_a_table_and_a_report(finished: Path) -> None:
    report = json.loads((finished / "runs/dummy/report.json").read_text())
    for arm in ("teacher", "student", "control"):
        assert set(report["results"][arm]) >= {"bits_per_byte", "kl_to_teacher", "top1_agreement"}
    assert report["results"]["teacher"]["kl_to_teacher"] == pytest.approx(0.0, abs=1e-4)
    assert report["results"]["teacher"]["top1_agreement"] == 1.0
    assert 0.0 < report["results"]["student"]["kl_to_teacher"] < 20.0
    assert isinstance(report["recovered"], float)
    cache = CacheReader.open(str(finished / "runs/dummy/caches/dummy"))
    teacher = report["teachers"]["dummy"]
    assert (teacher["engine"], teacher["engine_version"]) == ("dummy", cache.description.engine_version)
    assert teacher["tokens"] == cache.manifest.tokens > 0
    assert teacher["tokens_per_s"] == pytest.approx(teacher["tokens"] / teacher["capture_seconds"])
    assert report["caches"] == {"dummy": cache.manifest.fingerprint}
    exported = {path.name for path in (finished / "runs/dummy/export/student").iterdir()}
    assert {"config.json", "generation_config.json", "README.md", "provenance.json"} <= exported
    table = (finished / "stdout.txt").read_text()
    for word in ("teacher", "student", "control", "bits per byte", "recovered"):
        assert word in table


def test_a_second_run_finds_everything_done_without_starting_ray(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where a Ray that starts leaves its session
    again = stillhouse(finished, *RUN)
    assert again.returncode == 0
    assert again.stderr.count("done already") == 5
    assert "bits per byte" in again.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_reports_read_the_finished_run(finished: Path) -> None:
    cache = "runs/dummy/caches/dummy"
    status = json.loads(stillhouse(finished, "status", "dummy", "--json", *HERE).stdout)
    assert status["complete"] is True
    verified = stillhouse(finished, "verify", cache, "--json")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert json.loads(verified.stdout)["findings"] == []
    sequence = stillhouse(finished, "inspect", cache).stdout.split()[-1]
    assert "entropy" in stillhouse(finished, "inspect", cache, "--sequence", sequence).stdout
    assert stillhouse(finished, "gc", cache, "--grace-s", "0").returncode == 0
    assert stillhouse(finished, "verify", cache).returncode == 0


def test_after_an_interrupt_the_same_command_goes_on(tmp_path: Path, finished: Path) -> None:
    slow = ["capture", "dummy", "teachers[0].options.delay_s_per_token=0.002"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen([*STILLHOUSE, *slow], cwd=tmp_path, **pipes, text=True, start_new_session=True)
    commits = tmp_path / "runs/dummy/caches/dummy/commits"
    deadline_s = time.monotonic() + 90
    while len(list(commits.glob("*.json"))) < 2:
        assert time.monotonic() < deadline_s, "no unit was committed"
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: the same command continues from here" in output
    kept = {path.name: path.read_bytes() for path in commits.glob("*.json")}
    assert len(kept) >= 2
    again = stillhouse(tmp_path, *slow)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {name: (commits / name).read_bytes() for name in kept} == kept
