"""The stages of a run as a list, each launched as a job of its own.

A stage's process holds what that stage needs and nothing else: when training starts, the teachers' processes are gone
and their memory with them. What a stage leaves behind is found again by the next start of the same command.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.storage.layout import FAITHFULNESS_JSON
from pipeline.cache.storage.store import Store
from pipeline.config import Recipe, TeacherSpec
from pipeline.errors import EngineError, ExitCode, UsageError
from pipeline.identity import canonical_json, fingerprint
from pipeline.run.outputs import EXPORT, PROVENANCE_JSON, REPORT_JSON, REPORT_TXT, TRAIN_JSON

STAGES = ("capture", "train", "evaluate", "export")
WHERE_NOT_WHAT = {
    *("replicas", "placement", "tensor_parallel", "pipeline_parallel"),
    *("max_batched_tokens", "chunk_rows", "kv_cache_gib", "gpu_memory_share"),
}
"""A teacher's settings that change where and how fast it runs, not what it says."""
GRACE_S = 20.0
"""How long an interrupted job may take to leave before it is killed."""
INTERRUPTED = {130, -signal.SIGINT, -signal.SIGTERM}
"""How a job ends that was asked to leave."""


@dataclass(frozen=True, slots=True)
class Job:
    """One process: a module of a wing, with what it is told."""

    stage: str
    name: str
    """As in `train-student-control`; names the job's record."""
    module: str
    told: dict[str, Any]
    key: str
    """Fingerprint of all that the job's outcome depends on."""
    leaves: tuple[str, ...] = ()
    """Files in the run's storage that the job writes last."""


def run(recipe: Recipe, stages: Sequence[str] | None = None) -> ExitCode:
    """Run the stages that are not done yet, in order. The first that fails ends the run with its exit code.

    Raises StorageError where the run's storage cannot be written to.
    """
    store = Store.open(recipe.storage)
    jobs = [job for job in jobs_of(recipe) if job.stage in (stages or STAGES)]
    print(f"run {recipe.name}: {len(jobs)} jobs, storage {recipe.storage}", flush=True)
    worst = ExitCode.DONE
    for number, job in enumerate(jobs, 1):
        code = _see_to(store, job, f"[{number}/{len(jobs)}] {job.name}")
        if number == 1 and code is not ExitCode.USAGE:  # a recipe that is refused leaves that of the run alone
            store.put("recipe.json", (json.dumps(recipe.resolved(), indent=2) + "\n").encode())
        if code not in (ExitCode.DONE, ExitCode.INCOMPLETE):
            return code
        worst = max(worst, code)
    _show_report(store)
    return worst


def _see_to(store: Store, job: Job, title: str) -> ExitCode:
    """Run the job unless it is done, and note it once it is."""
    if is_done(store, job):
        print(f"{title}: done already", flush=True)
        return ExitCode.DONE
    print(f"{title}: starts", flush=True)
    started_s = time.monotonic()
    code = launch(job)
    seconds = time.monotonic() - started_s
    missing = [file for file in job.leaves if not store.exists(file)] if code == ExitCode.DONE else []
    outcome = f"failed: it left no {store.where(missing[0])}" if missing else _outcome(code)
    print(f"{title}: {outcome} after {seconds:.0f} s", flush=True)
    if missing or code not in set(ExitCode):
        return ExitCode.FAILED
    if code == ExitCode.DONE:
        store.put(f"jobs/{job.name}.json", canonical_json({"key": job.key, "seconds": round(seconds, 1)}).encode())
    return ExitCode(code)


def jobs_of(recipe: Recipe) -> Iterator[Job]:
    """Every job of a run in its order, each with the fingerprint of what it depends on."""
    resolved = recipe.resolved()
    teachers = [{key: teacher[key] for key in teacher.keys() - WHERE_NOT_WHAT} for teacher in resolved["teachers"]]
    depends = {name: resolved[name] for name in ("seed", "corpus", "capture")} | {"teachers": teachers}
    state = _source_state(recipe.corpus.source, *(teacher.model for teacher in recipe.teachers))
    captured = fingerprint(depends | {"state": state})
    # One job for all teachers: it runs them side by side where there is room.
    verdicts = tuple(f"{recipe.cache_path(teacher.name)}/{FAITHFULNESS_JSON}" for teacher in recipe.teachers)
    yield Job("capture", "capture", "actors.capture", {**recipe.job_values(), "teacher": None}, captured, verdicts)
    trainings = []
    for student in recipe.all_students:
        for arm in ("student", "control") if recipe.evaluation.control == "ce" else ("student",):
            depends = {"capture": captured, "seed": recipe.seed, "arm": arm}
            key = fingerprint(depends | {"student": student.model_dump_json(), "training": resolved["training"]})
            trainings.append(key)
            name = student.name if arm == "student" else f"{student.name}-{arm}"
            told = {**recipe.job_values(), "student": student.name, "arm": arm}
            record = f"{recipe.student_path(student.name, arm)}/{TRAIN_JSON}"
            yield Job("train", f"train-{name}", "student.train", told, key, (record,))
    key = fingerprint({"trainings": trainings, "evaluation": resolved["evaluation"]})
    if trainings:
        exports = tuple(f"{EXPORT}/{student.name}/{PROVENANCE_JSON}" for student in recipe.all_students)
        yield Job("evaluate", "evaluate", "student.evaluate", recipe.job_values(), key, (REPORT_JSON,))
        yield Job("export", "export", "student.export", recipe.job_values(), key, exports)


def is_done(store: Store, job: Job) -> bool:
    """Whether the job has ended well before, under the same fingerprint, and what it left is still there."""
    try:
        record = json.loads(store.read_if_present(f"jobs/{job.name}.json") or b"{}")
    except ValueError:
        return False
    same = isinstance(record, dict) and record.get("key") == job.key
    return same and all(store.exists(file) for file in job.leaves)


def launch(job: Job) -> int:
    """Run the job in a process of its own, in this terminal, and wait for its end: its exit code, or -signal.

    A SIGTERM is handed on. Raises KeyboardInterrupt where the job was asked to leave, by us or by others.
    """
    with tempfile.TemporaryDirectory(prefix="stillhouse-job-") as folder:
        told = Path(folder) / f"{job.name}.json"
        told.write_text(canonical_json(job.told))
        process = subprocess.Popen([sys.executable, "-m", job.module, str(told)], env=_environment())

        def hand_on(*_: object) -> None:
            process.terminate()
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, hand_on)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            _let_go(process)
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
    if code in INTERRUPTED:
        raise KeyboardInterrupt
    return code


def measure_throughput(recipe: Recipe, teacher: TeacherSpec) -> float:
    """Tokens a second at which one replica of the teacher scores the corpus, by a job that lets it read some units.

    Raises what ends the job: UsageError, EngineError.
    """
    told = {"recipe": recipe.resolved(), "teacher": teacher.name}
    with tempfile.TemporaryDirectory(prefix="stillhouse-job-") as folder:
        job, answer = Path(folder) / "probe.json", Path(folder) / "answer.json"
        job.write_text(canonical_json({**told, "answer": str(answer)}))
        command = [sys.executable, "-m", "actors.probe", str(job)]
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
        if done.returncode == ExitCode.DONE:
            return float(json.loads(answer.read_text())["tokens_per_s"])
    lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
    reason = next((line for line in lines if line.startswith("error: ")), lines[-1]).removeprefix("error: ")
    kind = UsageError if done.returncode == ExitCode.USAGE else EngineError
    raise kind(f"probe of teacher {teacher.name}: {reason}")


def _let_go(process: "subprocess.Popen[bytes]") -> None:
    """The job was interrupted too, by the terminal or by us; give it time to leave, then make it."""
    try:
        process.wait(GRACE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.send_signal(signal.SIGKILL)
        process.wait()


def _environment() -> dict[str, str]:
    """Our own environment, without what Ray and transformers would tell the world or the terminal."""
    return os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def _source_state(*sources: str) -> list[str]:
    """Names, sizes and times of local files, so that a run notices when its text or its model has changed."""
    paths = [Path(source) for source in sources]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    states = [(file, file.stat()) for file in files if file.is_file()]
    return [f"{file}:{state.st_size}:{state.st_mtime_ns}" for file, state in states]


def _outcome(code: int) -> str:
    if code < 0:
        return f"killed by signal {-code}{' (out of memory?)' if code == -signal.SIGKILL else ''}"
    return {0: "done", 3: "incomplete"}.get(code, f"failed (exit code {code})")


def _show_report(store: Store) -> None:
    """Once everything is done, the table that the run was for."""
    if store.exists(REPORT_TXT):
        print(store.read(REPORT_TXT).decode(), flush=True)
