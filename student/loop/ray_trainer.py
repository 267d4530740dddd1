"""Training with Ray Train's TorchTrainer, restarted when its workers die.

Every attempt is a new Ray Train run and starts from the latest checkpoint of `student.loop.checkpoint`; Ray Train's own
records are not needed.
"""

import json
import logging
import logging.handlers
import math
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
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
from pipeline.run.logs import configure_logging, stamp_host
from pipeline.run.ray_session import ray_session
from student.loop.checkpoint import latest_step
from student.tracking.progress import StepProgress, StepReport
from student.training_job import RAY_RECORDS, TrainingJob, remove_folder

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Failed attempts without a new checkpoint after which the job ends."""


def train_on_ray(job: TrainingJob) -> None:
    """Train on Ray workers. Raises a worker's StillhouseError; TrainingError if workers keep dying."""
    delete_ray_records(job)
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    if job.recipe.cluster.address == "local":  # saves an actor: there is no spot instance to watch
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    with ray_session(job.recipe.cluster, _local_cpus(job.recipe)), _shown_messages() as messages:
        fit_with_retries(lambda: _fit(_trainer(job, messages)), job)
    remove_folder(job.store, RAY_RECORDS)


def fit_with_retries(fit: Callable[[], object], job: TrainingJob) -> None:
    """Call `fit` until it returns, at most ATTEMPTS times in a row without a new checkpoint."""
    attempt, checkpointed = 1, latest_step(job.store)
    while True:
        try:
            fit()
            return
        except ray.train.TrainingFailedError as error:
            raise_worker_error(error)
            before, checkpointed = checkpointed, latest_step(job.store)
            attempt = 1 if checkpointed > before else attempt
            logger.warning("%s: attempt %d of %d failed: %s", job.title, attempt, ATTEMPTS, _last_line(error))
        if attempt == ATTEMPTS:
            raise TrainingError(
                f"{job.title}: {ATTEMPTS} attempts failed without a new checkpoint; see the lines above"
            )
        attempt += 1


def delete_ray_records(job: TrainingJob) -> None:
    """Delete what Ray Train has recorded of a killed job, with a warning for each truncated record."""
    for path in job.store.list(RAY_RECORDS):
        if path.endswith(".json") and not _is_json(job.store.read(path)):
            where = job.store.where(path)
            logger.warning("%s: %s: truncated record of Ray Train; deleted, not needed", job.title, where)
    remove_folder(job.store, RAY_RECORDS)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """Ray Train's `train_loop_per_worker`.

    `config`: the job as JSON, the queue of messages to the job's process, and the seconds between reported steps.
    Imports the training loop here, because Ray Train's controller imports this module too and does not need it.
    """
    with gc_paused():
        import torch

        from student.loop.worker import RunCallbacks, train_rank
        from student.loop.worker_group import WorkerGroup

    _log_to(config["messages"])
    job = TrainingJob.from_json(config["job"])
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(job.recipe.training.cpus_per_worker)))
    callbacks = RunCallbacks(ray.train.report, partial(_report_step, config["messages"]), config["step_every_s"])
    train_rank(job, WorkerGroup(context.get_world_rank(), context.get_world_size(), device), callbacks)


def raise_worker_error(error: ray.train.TrainingFailedError) -> None:
    """Raise the StillhouseError that a worker or the controller raised, if any: a retry would raise it again."""
    failures = getattr(error, "worker_failures", {})
    for failure in [failures[rank] for rank in sorted(failures)] + [getattr(error, "controller_failure", None)]:
        cause = getattr(failure, "_base_exc", failure)
        if isinstance(cause, StillhouseError):
            raise cause from None


def gpus_per_worker(training: TrainingSpec, cluster: Mapping[str, float]) -> float:
    """GPUs that each worker requests: the recipe's, else one if the cluster has enough for all workers, else none."""
    if training.gpus_per_worker is not None:
        return training.gpus_per_worker
    return 1.0 if cluster.get("GPU", 0.0) >= training.workers else 0.0


def _trainer(job: TrainingJob, messages: Queue) -> Any:
    training = job.recipe.training
    gpus = gpus_per_worker(training, ray.cluster_resources())
    resources = {"CPU": training.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    filesystem, path = _filesystem(job.store)
    return ray.train.torch.TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"job": job.to_json(), "messages": messages, "step_every_s": StepProgress().every_s},
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
    """Call `trainer.fit()` with Ctrl-C as KeyboardInterrupt: Ray Train's SIGINT handler exits with code 0."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, handler)


def _filesystem(store: Store) -> tuple[pyarrow.fs.FileSystem | None, str]:
    """Filesystem and path for Ray Train's records: a folder of the store, with the same fsspec settings."""
    local = store.local_path()
    if local is not None:
        return None, str(local / RAY_RECORDS)
    filesystem, path = fsspec.core.url_to_fs(f"{store.uri}/{RAY_RECORDS}")
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path


def _local_cpus(recipe: Recipe) -> int:
    """CPUs of a local Ray cluster: at least as many as the workers request. Raises RecipeError."""
    cluster, training = recipe.cluster, recipe.training
    needed = math.ceil(training.workers * training.cpus_per_worker)
    if cluster.address == "local" and cluster.cpus is not None and cluster.cpus < needed:
        raise RecipeError(f"cluster.cpus: expected at least {needed} for training.workers, got {cluster.cpus}")
    return max(os.cpu_count() or 1, needed)


def _log_to(messages: Queue) -> None:
    """Send this worker's log to the job's process, in place of Ray Train's handlers: of other ranks than 0 warnings."""
    configure_logging()
    handler = logging.handlers.QueueHandler(messages)
    handler.addFilter(stamp_host)
    if ray.train.get_context().get_world_rank() > 0:
        handler.setLevel("WARNING")
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel("WARNING")


def _report_step(messages: Queue, report: StepReport) -> None:
    with suppress(RayActorError):  # the training goes on without progress lines
        messages.put(report)


@contextmanager
def _shown_messages() -> Iterator[Queue]:
    """A Ray queue whose log records and step reports this process shows."""
    messages = Queue(actor_options={"num_cpus": 0})
    thread = threading.Thread(target=_show_all, args=(messages,), daemon=True, name="messages")
    thread.start()
    try:
        yield messages
    finally:
        with suppress(RayActorError):
            messages.put(None)
            thread.join()
        messages.shutdown()


def _show_all(messages: Queue) -> None:
    """Show messages until None arrives or the queue's actor has died."""
    progress = StepProgress()
    try:
        while (message := messages.get()) is not None:
            if isinstance(message, logging.LogRecord):
                logging.getLogger(message.name).handle(message)
            else:
                progress.show(message)
    except RayActorError:
        logger.warning("the progress of the training is not shown any more: the queue's actor has died")
    progress.close()


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
