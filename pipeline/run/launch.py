"""Starts jobs as processes of their own and waits for them."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.config import Recipe, TeacherSpec
from pipeline.errors import EngineError, ExitCode, UsageError
from pipeline.identity import canonical_json
from pipeline.run.jobs import JOB_MODULES, Job
from pipeline.run.logs import FORMAT_VARIABLE, LEVELS_VARIABLE

GRACE_S = 20.0
"""Time in which an interrupted job may end by itself before it is killed."""
INTERRUPTED = {130, -signal.SIGINT, -signal.SIGTERM}
"""Exit codes of a job that was asked to end."""


def launch(job: Job) -> int:
    """Run the job in a process on this terminal and wait for it; return its exit code, or -signal.

    A SIGTERM is passed on to it. Raises KeyboardInterrupt where the job was interrupted.
    """
    with _job_file(job.name, job.values) as path:
        process = subprocess.Popen([sys.executable, "-m", JOB_MODULES[job.stage], path], env=_environment())

        def pass_on(*_: object) -> None:
            process.terminate()
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, pass_on)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            _wait_or_kill(process)
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if code in INTERRUPTED:
        raise KeyboardInterrupt
    return code


def measure_throughput(recipe: Recipe, teacher: TeacherSpec) -> float:
    """Tokens a second at which one replica scores the corpus, measured by a job on a few units.

    Raises UsageError or EngineError with the job's own message where it fails.
    """
    with tempfile.TemporaryDirectory(prefix="stillhouse-probe-") as folder:
        answer = Path(folder) / "answer.json"
        values = {"recipe": recipe.to_dict(), "teacher": teacher.name, "answer": str(answer)}
        with _job_file("probe", values) as path:
            command = [sys.executable, "-m", JOB_MODULES["probe"], path]
            environment = _environment() | {LEVELS_VARIABLE: "", FORMAT_VARIABLE: "text"}  # its errors are read below
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == ExitCode.DONE:
            return float(json.loads(answer.read_text())["tokens_per_s"])
    lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    reason = (errors or lines)[-1]
    kind = UsageError if done.returncode == ExitCode.USAGE else EngineError
    raise kind(f"probe of teacher {teacher.name}: {reason}")


@contextmanager
def _job_file(name: str, values: dict[str, Any]) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="stillhouse-job-") as folder:
        path = Path(folder) / f"{name}.json"
        path.write_text(canonical_json(values))
        yield str(path)


def _wait_or_kill(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(GRACE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.send_signal(signal.SIGKILL)
        process.wait()


def _environment() -> dict[str, str]:
    """The environment of jobs: Ray sends no usage statistics, tokenizers do not warn about forks."""
    return os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
