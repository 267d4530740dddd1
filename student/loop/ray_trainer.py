"""The training on Ray Train's workers: one group, started anew where its workers die.

Ray keeps no state that matters: every attempt is an experiment of its own, and where it goes on from is the newest
checkpoint that carries our own marker.
"""

import json
import math
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import fsspec
import pyarrow.fs
import ray
import ray.train
import ray.train.torch
from ray.exceptions import RayActorError
from ray.util.queue import Queue

from pipeline.cache.storage.store import Store
from pipeline.config import Recipe, TrainingSpec
from pipeline.errors import RecipeError, StillhouseError, TrainingError
from pipeline.run.gc_paused import gc_paused
from pipeline.run.progress import line_every_s
from pipeline.run.ray_session import ray_session
from student.loop.checkpoint import newest_step
from student.training_job import RAY_RECORDS, TrainingJob, remove_folder

ATTEMPTS = 3
"""Times that a group is started without a new checkpoint before the job gives up."""


def train_on_ray(job: TrainingJob, say: Callable[[str], None]) -> None:
    """Train on workers. Raises what a worker raised on purpose; TrainingError where they keep dying."""
    forget_records(job, say)
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    if job.recipe.cluster.address == "local":  # a machine that is nobody's spot instance: one actor less to start
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    with ray_session(job.recipe.cluster, _local_cpus(job.recipe)), _lines_to(say) as lines:
        until_done(lambda: _fit(_trainer(job, lines)), job, say)
    remove_folder(job.store, RAY_RECORDS)


def until_done(fit: Callable[[], object], job: TrainingJob, say: Callable[[str], None]) -> None:
    """Call `fit` until it returns: `ATTEMPTS` times, counted anew whenever a checkpoint was added."""
    attempt, reached = 1, newest_step(job.store)
    while True:
        try:
            fit()
            return
        except ray.train.TrainingFailedError as error:
            raise_ours(error)
            before, reached = reached, newest_step(job.store)
            attempt = 1 if reached > before else attempt
            say(f"{job.title}: attempt {attempt} of {ATTEMPTS} ended early: {_last_line(error)}")
        if attempt == ATTEMPTS:
            raise TrainingError(f"{job.title}: {ATTEMPTS} attempts ended early; see the lines above")
        attempt += 1


def forget_records(job: TrainingJob, say: Callable[[str], None]) -> None:
    """Delete what Ray has kept of a job that was killed; a line says of a record that it is cut off."""
    for path in job.store.list(RAY_RECORDS):
        if path.endswith(".json") and not _is_json(job.store.read(path)):
            say(f"{job.title}: {job.store.where(path)}: a record of Ray's that is cut off; deleted, nothing needs it")
    remove_folder(job.store, RAY_RECORDS)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def on_worker(config: dict[str, Any]) -> None:
    """What Ray Train calls on every worker.

    The student's code is imported here alone: Ray's controller reads this file too, and would take seconds for it.
    """
    with gc_paused():
        import torch

        from student.loop.worker import RunCallbacks, train_rank
        from student.loop.worker_group import WorkerGroup

    job = TrainingJob.from_json(config["told"])
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(job.recipe.training.cpus_per_worker)))
    outside = RunCallbacks(say=config["lines"].put, report=ray.train.report, line_every_s=config["line_every_s"])
    train_rank(job, WorkerGroup(context.get_world_rank(), context.get_world_size(), device), outside)


def raise_ours(error: ray.train.TrainingFailedError) -> None:
    """Raise the error that a worker raised on purpose, if one did: starting anew would only meet it again."""
    failures = getattr(error, "worker_failures", {})
    for failure in [failures[rank] for rank in sorted(failures)] + [getattr(error, "controller_failure", None)]:
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, StillhouseError):
            raise cause from None


def gpus_per_worker(training: TrainingSpec, cluster: Mapping[str, float]) -> float:
    """What a worker asks a cluster with those resources for."""
    if training.gpus_per_worker is not None:
        return training.gpus_per_worker
    return 1.0 if cluster.get("GPU", 0.0) >= training.workers else 0.0


def _trainer(job: TrainingJob, lines: Queue) -> Any:
    training = job.recipe.training
    gpus = gpus_per_worker(training, ray.cluster_resources())
    resources = {"CPU": training.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    filesystem, path = _filesystem(job.store)
    return ray.train.torch.TorchTrainer(
        on_worker,
        train_loop_config={"told": job.to_json(), "lines": lines, "line_every_s": line_every_s()},
        scaling_config=ray.train.ScalingConfig(
            num_workers=training.workers, use_gpu=gpus > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=uuid.uuid4().hex,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=0),
        ),
    )


def _fit(trainer: Any) -> None:
    """Ray Train's own handler of Ctrl-C aborts the run, ends the process with 0, and stays."""
    before = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


def _filesystem(store: Store) -> tuple[pyarrow.fs.FileSystem | None, str]:
    """Where Ray may put its records: beside ours, through the same fsspec settings."""
    local = store.local_path()
    if local is not None:
        return None, str(local / RAY_RECORDS)
    filesystem, path = fsspec.core.url_to_fs(f"{store.uri}/{RAY_RECORDS}")
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path


def _local_cpus(recipe: Recipe) -> int:
    """A Ray of our own offers as many CPUs as the workers ask for."""
    cluster, training = recipe.cluster, recipe.training
    needed = math.ceil(training.workers * training.cpus_per_worker)
    if cluster.address == "local" and cluster.cpus is not None and cluster.cpus < needed:
        raise RecipeError(f"cluster.cpus: expected at least {needed} for training.workers, got {cluster.cpus}")
    return max(os.cpu_count() or 1, needed)


@contextmanager
def _lines_to(say: Callable[[str], None]) -> Iterator[Queue]:
    """A queue whose lines are said here, wherever they come from: Ray's own forwarding mixes them with its own."""
    lines = Queue(actor_options={"num_cpus": 0})
    thread = threading.Thread(target=_say_all, args=(lines, say), daemon=True, name="lines")
    thread.start()
    try:
        yield lines
    finally:
        with suppress(RayActorError):
            lines.put(None)
            thread.join()
        lines.shutdown()


def _say_all(lines: Queue, say: Callable[[str], None]) -> None:
    """Until None comes, or the queue's machine is gone."""
    with suppress(RayActorError):
        while (line := lines.get()) is not None:
            say(line)


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
