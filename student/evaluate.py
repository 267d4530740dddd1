"""The evaluation job: `python -m student.evaluate JOB.json`. Every student and control against the teacher.

Writes `report.txt` (the table) and, last, `report.json` into the run's storage.
"""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from pipeline.cache.reader import CacheReader
from pipeline.cache.storage.store import Store
from pipeline.config import Recipe, StudentSpec, recipe_from_job_dict
from pipeline.contracts import LmHead, ScoredSequence
from pipeline.errors import UsageError
from pipeline.planning.throughput import read_throughput
from pipeline.run.outputs import REPORT_JSON, REPORT_TXT, TRAIN_JSON
from pipeline.run.progress import counted
from student.evaluation.measure import HeldOut, MetricAccumulator, Metrics, measure, pack_held_out
from student.evaluation.table import format_table
from student.loop.worker_group import default_device
from student.model.build import Student, head_spec
from student.release.final import load_final
from student.training_job import Arm, TrainingJob, package_versions, run_job


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """Measure every student and control; returns what `report.json` holds. Raises StillhouseError."""
    started_s = time.monotonic()
    students = {spec.name: _evaluate_student(recipe, spec) for spec in recipe.all_students}
    first = next(iter(students.values()))
    caches = {teacher.name: CacheReader.open(recipe.cache_uri(teacher.name)) for teacher in recipe.teachers}
    report = {
        "results": first["results"],
        "recovered": first["recovered"],
        "recovered_kl": first["recovered_kl"],
        "students": students,
        "teachers": {name: _teacher(cache) for name, cache in caches.items()},
        "caches": {name: cache.manifest.fingerprint for name, cache in caches.items()},
        "seconds": round(time.monotonic() - started_s, 1),
        "versions": package_versions(),
        "recipe": recipe.to_dict(),
    }
    table = format_table(report)
    store = Store.open(recipe.storage)
    store.put(REPORT_TXT, (table + "\n").encode())
    store.put(REPORT_JSON, json.dumps(report, indent=2).encode())
    return report


def _teacher(cache: CacheReader) -> dict[str, Any]:
    """Who hosted the teacher, and how fast it was captured. The pace is of what this release has captured."""
    pace = read_throughput(cache.store)
    return {
        "model": cache.identity.notes.get("model"),
        "engine": cache.description.engine,
        "engine_version": cache.description.engine_version,
        "tokens": cache.manifest.tokens,
        "capture_seconds": pace.seconds,
        "tokens_per_s": pace.tokens_per_s,
    }


def _evaluate_student(recipe: Recipe, spec: StudentSpec) -> dict[str, Any]:
    cache, head = teacher_of(recipe, spec)
    rows = held_out_sequences(cache, recipe.evaluation.max_tokens)
    arms: list[Arm] = ["student", "control"] if recipe.evaluation.control == "ce" else ["student"]
    results: dict[str, Metrics] = {}
    trainings: dict[str, Any] = {}
    sums = MetricAccumulator()
    for arm in arms:
        job = TrainingJob(recipe, spec.name, arm)
        trainings[arm] = _training_of(job)
        print(f"{job.title}: measuring on {len(rows)} held-out sequences", flush=True)
        sums, theirs = _measure(job, rows, head, recipe.evaluation.batch_tokens)
        results |= {"teacher": theirs.measures(), arm: sums.measures()}
    return {
        "results": {name: asdict(measures) for name, measures in results.items()},
        "recovered": recovered(results, "bits_per_byte"),
        "recovered_kl": recovered(results, "kl_to_teacher"),
        "held_out": {"sequences": len(rows), "labels": sums.labels, "bytes": sums.bytes},
        "trainings": trainings,
    }


def recovered(results: dict[str, Metrics], measure_name: str) -> float | None:
    """(student - control) / (teacher - control): 1 is the teacher itself. None without a control, or without a gap."""
    if "control" not in results:
        return None
    student, control, teacher = (getattr(results[arm], measure_name) for arm in ("student", "control", "teacher"))
    return None if teacher == control else (student - control) / (teacher - control)


def teacher_of(recipe: Recipe, spec: StudentSpec) -> tuple[CacheReader, LmHead]:
    """The cache that a student is measured against: of the teacher that it comes from, else the recipe's first.

    Raises UsageError where its engine gave no LM head.
    """
    cache = CacheReader.open(recipe.cache_uri(spec.from_teacher or recipe.training_teachers[0].name))
    head = cache.lm_head()
    if head is None:
        raise UsageError(f"cache {cache.store.uri}: expected the teacher's LM head, got none: evaluation needs it")
    return cache, head


def held_out_sequences(cache: CacheReader, max_tokens: int | None) -> list[ScoredSequence]:
    """The held-out sequences with exact distributions, up to so many tokens. Raises UsageError where there are none."""
    rows: list[ScoredSequence] = []
    tokens = 0
    for row in cache.rows("held_out"):
        tokens += len(row.sequence.input_ids_N)
        if max_tokens is not None and rows and tokens > max_tokens:
            break
        if row.signals.exact_hidden_TD is not None and row.sequence.loss_mask_N[1:].any():
            rows.append(row)
    if not rows:
        raise UsageError(f"cache {cache.store.uri}: expected held-out sequences, got none; raise corpus.held_out")
    return rows


def _measure(
    job: TrainingJob, rows: Sequence[ScoredSequence], head: LmHead, batch_tokens: int
) -> tuple[MetricAccumulator, MetricAccumulator]:
    device = default_device(job.recipe.training)
    model = Student(load_final(job.store)).to(device).eval()
    shown = counted(rows, f"{job.title}: measuring", "sequence", len(rows))
    return measure(_batches(shown, batch_tokens, device), head, model, head_spec(model.model.config))


def _batches(rows: Iterable[ScoredSequence], batch_tokens: int, device: torch.device) -> Iterator[HeldOut]:
    gathered: list[ScoredSequence] = []
    tokens = 0
    for row in rows:
        length = len(row.sequence.input_ids_N)
        if gathered and tokens + length > batch_tokens:
            yield pack_held_out(gathered, device)
            gathered, tokens = [], 0
        gathered.append(row)
        tokens += length
    yield pack_held_out(gathered, device)


def _training_of(job: TrainingJob) -> dict[str, Any]:
    data = job.store.read_if_present(TRAIN_JSON)
    if data is None:
        raise UsageError(f"{job.title} ({job.store.uri}): not trained yet; run: stillhouse train {job.recipe.name}")
    record = json.loads(data)
    return {key: record[key] for key in ("fingerprint", "steps", "tokens", "seconds", "peak_rss_bytes", "versions")}


def main(arguments: Sequence[str]) -> int:
    """Run the job that a file describes; answer with the exit code."""
    return run_job(_job, arguments)


def _job(job: dict[str, Any]) -> None:
    recipe = recipe_from_job_dict(job)
    report = evaluate(recipe)
    print(f"evaluated in {report['seconds']:.0f} s: {Store.open(recipe.storage).where(REPORT_JSON)}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
