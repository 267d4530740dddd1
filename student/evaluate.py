"""The evaluation job: `python -m student.evaluate JOB.json` measures every student and control on held-out text.

Writes `report.txt` (the table) and then `report.json` to the run's storage.
"""

import json
import logging
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
from pipeline.run.job_process import run_job
from pipeline.run.outputs import REPORT_JSON, REPORT_TXT, TRAIN_JSON
from pipeline.run.progress import counted
from student.evaluation.measure import HeldOutBatch, MetricAccumulator, Metrics, measure, pack_held_out
from student.evaluation.table import format_table
from student.loop.worker_group import default_device
from student.model.build import Student, head_spec
from student.release.final import load_final
from student.training_job import Arm, TrainingJob, package_versions

logger = logging.getLogger(__name__)


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """Evaluate every student, write the report, and return the contents of `report.json`. Raises StillhouseError."""
    started_s = time.monotonic()
    students = {spec.name: evaluate_student(recipe, spec) for spec in recipe.all_students}
    first = next(iter(students.values()))
    caches = {teacher.name: CacheReader.open(recipe.cache_uri(teacher.name)) for teacher in recipe.teachers}
    report = {
        "results": first["results"],
        "recovered": first["recovered"],
        "recovered_kl": first["recovered_kl"],
        "students": students,
        "teachers": {name: _teacher_summary(cache) for name, cache in caches.items()},
        "caches": {name: cache.manifest.fingerprint for name, cache in caches.items()},
        "seconds": round(time.monotonic() - started_s, 1),
        "versions": package_versions(),
        "recipe": recipe.to_dict(),
    }
    store = Store.open(recipe.storage)
    store.put(REPORT_TXT, (format_table(report) + "\n").encode())
    store.put(REPORT_JSON, json.dumps(report, indent=2).encode())
    return report


def _teacher_summary(cache: CacheReader) -> dict[str, Any]:
    """Engine of the teacher, and throughput of its capture, as far as captures recorded it."""
    throughput = read_throughput(cache.store)
    return {
        "model": cache.identity.notes.get("model"),
        "engine": cache.description.engine,
        "engine_version": cache.description.engine_version,
        "tokens": cache.manifest.tokens,
        "capture_seconds": throughput.seconds,
        "tokens_per_s": throughput.tokens_per_s,
    }


def evaluate_student(recipe: Recipe, spec: StudentSpec) -> dict[str, Any]:
    """Measure a student, its control (if the recipe has one) and its teacher on the same held-out sequences."""
    cache, head = cache_and_lm_head(recipe, spec)
    sequences = held_out_sequences(cache, recipe.evaluation.max_tokens)
    arms: list[Arm] = ["student", "control"] if recipe.evaluation.control == "ce" else ["student"]
    results: dict[str, Metrics] = {}
    trainings: dict[str, Any] = {}
    of_model = MetricAccumulator()
    for arm in arms:
        job = TrainingJob(recipe, spec.name, arm)
        trainings[arm] = _training_summary(job)
        logger.info("%s: measuring on %d held-out sequences", job.title, len(sequences))
        of_model, of_teacher = _measure(job, sequences, head, recipe.evaluation.batch_tokens)
        results |= {"teacher": of_teacher.compute(), arm: of_model.compute()}
    return {
        "results": {name: asdict(metrics) for name, metrics in results.items()},
        "recovered": recovered_gap(results, "bits_per_byte"),
        "recovered_kl": recovered_gap(results, "kl_to_teacher"),
        "held_out": {"sequences": len(sequences), "labels": of_model.labels, "bytes": of_model.bytes},
        "trainings": trainings,
    }


def recovered_gap(results: dict[str, Metrics], metric: str) -> float | None:
    """(student - control) / (teacher - control), 1 for a student equal to the teacher. None without control or gap.

    The performance gap recovered (PGR) of Burns et al. 2023.
    """
    if "control" not in results:
        return None
    student, control, teacher = (getattr(results[arm], metric) for arm in ("student", "control", "teacher"))
    return None if teacher == control else (student - control) / (teacher - control)


def cache_and_lm_head(recipe: Recipe, spec: StudentSpec) -> tuple[CacheReader, LmHead]:
    """Cache and LM head of the teacher that the student's layers come from, else of the recipe's first teacher.

    Raises UsageError if the cache has no LM head.
    """
    cache = CacheReader.open(recipe.cache_uri(spec.from_teacher or recipe.training_teachers[0].name))
    head = cache.lm_head()
    if head is None:
        raise UsageError(f"cache {cache.store.uri}: expected the teacher's LM head, got none: evaluation needs it")
    return cache, head


def held_out_sequences(cache: CacheReader, max_tokens: int | None) -> list[ScoredSequence]:
    """Held-out sequences with exact hidden states: up to `max_tokens`, at least one. Raises UsageError for none."""
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
    job: TrainingJob, sequences: Sequence[ScoredSequence], head: LmHead, batch_tokens: int
) -> tuple[MetricAccumulator, MetricAccumulator]:
    device = default_device(job.recipe.training)
    model = Student(load_final(job.store)).to(device).eval()
    with_progress = counted(sequences, f"{job.title}: measuring", "sequence", len(sequences))
    return measure(_batches(with_progress, batch_tokens, device), head, model, head_spec(model.model.config))


def _batches(sequences: Iterable[ScoredSequence], batch_tokens: int, device: torch.device) -> Iterator[HeldOutBatch]:
    batch: list[ScoredSequence] = []
    tokens = 0
    for scored in sequences:
        length = len(scored.sequence.input_ids_N)
        if batch and tokens + length > batch_tokens:
            yield pack_held_out(batch, device)
            batch, tokens = [], 0
        batch.append(scored)
        tokens += length
    yield pack_held_out(batch, device)


def _training_summary(job: TrainingJob) -> dict[str, Any]:
    data = job.store.read_if_present(TRAIN_JSON)
    if data is None:
        raise UsageError(f"{job.title} ({job.store.uri}): not trained yet; run: stillhouse train {job.recipe.name}")
    record = json.loads(data)
    return {key: record[key] for key in ("fingerprint", "steps", "tokens", "seconds", "peak_rss_bytes", "versions")}


def main(arguments: Sequence[str]) -> int:
    """Run the job of a job file and return the exit code."""
    return run_job(_evaluate_job, arguments)


def _evaluate_job(job: dict[str, Any]) -> None:
    recipe = recipe_from_job_dict(job)
    report = evaluate(recipe)
    logger.info("evaluated in %.0f s: %s", report["seconds"], Store.open(recipe.storage).where(REPORT_JSON))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
