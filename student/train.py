"""The training job: `python -m student.train JOB.json` trains one student or control; the same command resumes.

Reads the teachers' caches and model configs, and loads no teacher. Imports torch and Ray only if there is work to do.
"""

import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from pipeline.cache.reader import CacheReader
from pipeline.cache.storage.layout import CACHE_JSON
from pipeline.cache.storage.store import Store
from pipeline.config import Recipe, TeacherSpec
from pipeline.corpus.prepare import check_cache_identity
from pipeline.errors import UsageError
from pipeline.identity import differing_fields, fingerprint
from pipeline.run.gc_paused import gc_paused
from pipeline.run.job_process import run_job
from pipeline.run.outputs import TRAIN_JSON
from student.model.dtype import resolve_dtype
from student.training_job import (
    CHECKPOINTS,
    FINAL,
    IDENTITY_JSON,
    RAY_RECORDS,
    TrainingJob,
    remove_folder,
    training_identity,
)

logger = logging.getLogger(__name__)


def train(job: TrainingJob) -> None:
    """Check the job, claim its folder, and train until `train.json` exists. Raises StillhouseError."""
    for teacher in job.recipe.teachers:
        check_captured(job.recipe, teacher)
        check_cache_identity(job.recipe, teacher)
    caches = job.caches()
    identity = training_identity(job, caches)
    if is_finished(job.store, identity):
        delete_leftovers(job.store)
        logger.info("%s: done already (%s)", job.title, job.store.uri)
        return
    check_folder_is_free(job, identity)
    check_caches(job, caches)
    claim_folder(job, identity)
    started_s = time.monotonic()
    if job.recipe.training.workers == 0:
        train_in_process(job)
    else:
        with gc_paused():
            from student.loop.ray_trainer import train_on_ray
        train_on_ray(job)
    logger.info("%s: trained in %.0f s, %s/final", job.title, time.monotonic() - started_s, job.store.uri)


def check_captured(recipe: Recipe, teacher: TeacherSpec) -> None:
    """Raise UsageError if the teacher has no cache yet."""
    store = Store.open(recipe.cache_uri(teacher.name))
    if not store.exists(CACHE_JSON):
        raise UsageError(f"cache {store.uri}: not captured yet; run: stillhouse capture {recipe.name}")


def is_finished(store: Store, identity: dict[str, Any]) -> bool:
    """Whether `train.json` exists and has this identity's fingerprint."""
    data = store.read_if_present(TRAIN_JSON)
    return data is not None and json.loads(data)["fingerprint"] == fingerprint(identity)


def delete_leftovers(store: Store) -> None:
    """Delete checkpoints and Ray Train's records, which a job leaves if it is killed right after `train.json`."""
    for folder in (CHECKPOINTS, RAY_RECORDS):
        remove_folder(store, folder)


def check_folder_is_free(job: TrainingJob, identity: dict[str, Any]) -> None:
    """Raise UsageError if the folder has another training's final weights or checkpoint."""
    store, previous = job.store, _read_identity(job.store)
    if previous in (None, identity) or not (store.exists(TRAIN_JSON) or store.list(CHECKPOINTS)):
        return
    raise UsageError(
        f"{job.title}: {store.uri} has a training with other settings "
        f"({'; '.join(differing_fields(identity, previous))}); restore them, set another storage or student.name, or "
        "delete that folder"
    )


def check_caches(job: TrainingJob, caches: Sequence[CacheReader]) -> None:
    """Raise AdmissionError or RecipeError if the job cannot be trained from the caches; log the losses' warnings."""
    with gc_paused():
        from student.data.admission import check_training_job
        from student.losses.registry import comparison_warnings

    check_training_job(job, caches)
    if job.arm == "student":
        for warning in comparison_warnings(job.recipe.training.distribution):
            logger.warning("%s: %s", job.title, warning)


def claim_folder(job: TrainingJob, identity: dict[str, Any]) -> None:
    """Write `identity.json`. Files of another training that reached no checkpoint are deleted, which is logged."""
    check_folder_is_free(job, identity)
    store, previous = job.store, _read_identity(job.store)
    if previous == identity:
        return
    if previous is not None:
        changes = "; ".join(differing_fields(identity, previous))
        logger.info("%s: restarts with other settings: %s", job.title, changes)
        for path in ["log.jsonl", "timing.jsonl", *store.list("tensorboard"), *store.list(FINAL)]:
            store.delete(path)
    store.put(IDENTITY_JSON, json.dumps(identity, indent=2).encode())


def _read_identity(store: Store) -> dict[str, Any] | None:
    data = store.read_if_present(IDENTITY_JSON)
    return None if data is None else dict(json.loads(data))


def train_in_process(job: TrainingJob) -> None:
    """Train in this process, without Ray (`training.workers: 0`)."""
    with gc_paused():
        from student.loop.worker import RunCallbacks, train_rank
        from student.loop.worker_group import WorkerGroup, default_device
        from student.tracking.progress import StepProgress

    group, progress = WorkerGroup(device=default_device(job.recipe.training)), StepProgress()
    try:
        train_rank(job, group, RunCallbacks(lambda _: None, progress.show, progress.every_s))
    finally:
        progress.close()


def main(arguments: Sequence[str]) -> int:
    """Run the job of a job file and return the exit code."""
    return run_job(lambda job: train(resolve_dtype(TrainingJob.from_json(job))), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
