"""The training job: `python -m student.train JOB.json`, one student or one control, started again to resume.

It reads shards and nothing else of a teacher. Ray Train places the workers and puts them into one group; where a
training stands is written by its own checkpoints alone, so no record of Ray's can hold it up.
"""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from pipeline.cache.layout import CACHE_JSON
from pipeline.cache.storage import Store
from pipeline.config import Recipe, TeacherSpec
from pipeline.errors import UsageError
from pipeline.identity import difference, fingerprint
from pipeline.imports import collector_at_rest
from pipeline.outputs import TRAIN_JSON
from pipeline.prepare import check_cache_is_of
from pipeline.progress import line_every_s
from student.job import (
    CHECKPOINTS,
    FINAL,
    IDENTITY_JSON,
    RAY_RECORDS,
    Told,
    remove_folder,
    run_job,
    training_identity,
)
from student.precision import decided


def train(told: Told) -> None:
    """Train until `train.json` stands; at once if it does. Raises StillhouseError."""
    for teacher in told.recipe.teachers:
        check_captured(told.recipe, teacher)
        check_cache_is_of(told.recipe, teacher)
    caches = told.caches()
    identity = training_identity(told, caches)
    if is_finished(told.store, identity):
        for folder in (CHECKPOINTS, RAY_RECORDS):  # of a job that was killed before it had tidied up
            remove_folder(told.store, folder)
        say(f"{told.title}: done already ({told.store.uri})")
        return
    check_nothing_is_lost(told, identity)
    with collector_at_rest():
        from student.admission import check_before
        from student.losses import cautions

    check_before(told, caches)
    claim(told, identity)
    if told.arm == "student":
        for caution in cautions(told.recipe.training.distribution):
            say(f"{told.title}: {caution}")
    started_s = time.monotonic()
    if told.recipe.training.workers == 0:
        train_here(told)
    else:
        with collector_at_rest():
            from student.on_ray import train_on_ray

        train_on_ray(told, say)
    say(f"{told.title}: trained in {time.monotonic() - started_s:.0f} s, {told.store.uri}/final")


def check_captured(recipe: Recipe, teacher: TeacherSpec) -> None:
    """Raise UsageError, with the command that comes first, where the teacher's cache is not even begun."""
    store = Store.open(recipe.cache_uri(teacher.name))
    if not store.exists(CACHE_JSON):
        raise UsageError(f"cache {store.uri}: not captured yet; run: stillhouse capture {recipe.name}")


def is_finished(store: Store, identity: dict[str, Any]) -> bool:
    """Whether this very training has ended well."""
    data = store.read_if_present(TRAIN_JSON)
    return data is not None and json.loads(data)["fingerprint"] == fingerprint(identity)


def check_nothing_is_lost(told: Told, identity: dict[str, Any]) -> None:
    """Raise UsageError where the folder holds another training that is finished or has a checkpoint."""
    store, before = told.store, _owner(told.store)
    if before in (None, identity) or not (store.exists(TRAIN_JSON) or store.list(CHECKPOINTS)):
        return
    raise UsageError(
        f"{told.title}: {store.uri} holds a training with other settings ({'; '.join(difference(identity, before))}); "
        "set them back, give this one another storage or student.name, or delete that folder to train anew"
    )


def claim(told: Told, identity: dict[str, Any]) -> None:
    """Make the folder this training's own. One that did not get to a checkpoint makes room, and a line says so."""
    check_nothing_is_lost(told, identity)
    store, before = told.store, _owner(told.store)
    if before == identity:
        return
    if before is not None:
        say(f"{told.title}: starts anew, for {'; '.join(difference(identity, before))}")
        for path in ["log.jsonl", "timing.jsonl", *store.list("tensorboard"), *store.list(FINAL)]:
            store.delete(path)
    store.put(IDENTITY_JSON, json.dumps(identity, indent=2).encode())


def _owner(store: Store) -> dict[str, Any] | None:
    """The training that the folder belongs to."""
    data = store.read_if_present(IDENTITY_JSON)
    return None if data is None else dict(json.loads(data))


def train_here(told: Told) -> None:
    """Train in this process."""
    with collector_at_rest():
        from student.group import Group, own_device
        from student.worker import Outside, train_rank

    group = Group(device=own_device(told.recipe.training))
    train_rank(told, group, Outside(say=say, report=lambda _: None, line_every_s=line_every_s()))


def say(line: str) -> None:
    """A line for the user, at once."""
    print(line, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run the job that a file describes; answer with the exit code."""
    return run_job(lambda job: train(decided(Told.from_json(job))), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
