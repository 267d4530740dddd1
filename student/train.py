"""The training job: `python -m student.train JOB.json`, one student or one control, started again to resume.

It reads shards and nothing else of a teacher. Ray Train places the workers and puts them into one group; where a
training stands is written by its own checkpoints alone, so no record of Ray's can hold it up.
"""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from pipeline.cache.storage.layout import CACHE_JSON
from pipeline.cache.storage.store import Store
from pipeline.config import Recipe, TeacherSpec
from pipeline.corpus.prepare import check_cache_identity
from pipeline.errors import UsageError
from pipeline.identity import differing_fields, fingerprint
from pipeline.run.gc_paused import gc_paused
from pipeline.run.outputs import TRAIN_JSON
from pipeline.run.progress import line_every_s
from student.model.dtype import resolve_dtype
from student.training_job import (
    CHECKPOINTS,
    FINAL,
    IDENTITY_JSON,
    RAY_RECORDS,
    TrainingJob,
    remove_folder,
    run_job,
    training_identity,
)


def train(job: TrainingJob) -> None:
    """Train until `train.json` stands; at once if it does. Raises StillhouseError."""
    for teacher in job.recipe.teachers:
        check_captured(job.recipe, teacher)
        check_cache_identity(job.recipe, teacher)
    caches = job.caches()
    identity = training_identity(job, caches)
    if is_finished(job.store, identity):
        for folder in (CHECKPOINTS, RAY_RECORDS):  # of a job that was killed before it had tidied up
            remove_folder(job.store, folder)
        say(f"{job.title}: done already ({job.store.uri})")
        return
    check_nothing_is_lost(job, identity)
    with gc_paused():
        from student.data.admission import check_training_job
        from student.losses.registry import comparison_warnings

    check_training_job(job, caches)
    claim(job, identity)
    if job.arm == "student":
        for caution in comparison_warnings(job.recipe.training.distribution):
            say(f"{job.title}: {caution}")
    started_s = time.monotonic()
    if job.recipe.training.workers == 0:
        train_here(job)
    else:
        with gc_paused():
            from student.loop.ray_trainer import train_on_ray

        train_on_ray(job, say)
    say(f"{job.title}: trained in {time.monotonic() - started_s:.0f} s, {job.store.uri}/final")


def check_captured(recipe: Recipe, teacher: TeacherSpec) -> None:
    """Raise UsageError, with the command that comes first, where the teacher's cache is not even begun."""
    store = Store.open(recipe.cache_uri(teacher.name))
    if not store.exists(CACHE_JSON):
        raise UsageError(f"cache {store.uri}: not captured yet; run: stillhouse capture {recipe.name}")


def is_finished(store: Store, identity: dict[str, Any]) -> bool:
    """Whether this very training has ended well."""
    data = store.read_if_present(TRAIN_JSON)
    return data is not None and json.loads(data)["fingerprint"] == fingerprint(identity)


def check_nothing_is_lost(job: TrainingJob, identity: dict[str, Any]) -> None:
    """Raise UsageError where the folder holds another training that is finished or has a checkpoint."""
    store, before = job.store, _owner(job.store)
    if before in (None, identity) or not (store.exists(TRAIN_JSON) or store.list(CHECKPOINTS)):
        return
    raise UsageError(
        f"{job.title}: {store.uri} holds a training with other settings ({'; '.join(differing_fields(identity, before))}); "
        "set them back, give this one another storage or student.name, or delete that folder to train anew"
    )


def claim(job: TrainingJob, identity: dict[str, Any]) -> None:
    """Make the folder this training's own. One that did not get to a checkpoint makes room, and a line says so."""
    check_nothing_is_lost(job, identity)
    store, before = job.store, _owner(job.store)
    if before == identity:
        return
    if before is not None:
        say(f"{job.title}: starts anew, for {'; '.join(differing_fields(identity, before))}")
        for path in ["log.jsonl", "timing.jsonl", *store.list("tensorboard"), *store.list(FINAL)]:
            store.delete(path)
    store.put(IDENTITY_JSON, json.dumps(identity, indent=2).encode())


def _owner(store: Store) -> dict[str, Any] | None:
    """The training that the folder belongs to."""
    data = store.read_if_present(IDENTITY_JSON)
    return None if data is None else dict(json.loads(data))


def train_here(job: TrainingJob) -> None:
    """Train in this process."""
    with gc_paused():
        from student.loop.worker import RunCallbacks, train_rank
        from student.loop.worker_group import WorkerGroup, own_device

    group = WorkerGroup(device=own_device(job.recipe.training))
    train_rank(job, group, RunCallbacks(say=say, report=lambda _: None, line_every_s=line_every_s()))


def say(line: str) -> None:
    """A line for the user, at once."""
    print(line, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run the job that a file describes; answer with the exit code."""
    return run_job(lambda job: train(resolve_dtype(TrainingJob.from_json(job))), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
