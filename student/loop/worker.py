"""The training loop of one rank, from the caches to the trained weights. Imports neither Ray nor vLLM."""

import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.cache.reader import CacheReader
from pipeline.identity import fingerprint
from pipeline.run.outputs import TRAIN_JSON
from pipeline.run.progress import HEARTBEAT_S
from student.data.dataset import make_batch_sampler, make_dataset
from student.data.prefetch import PrefetchLoader
from student.loop.checkpoint import CheckpointWriter, Snapshot, delete_all_checkpoints
from student.loop.distiller import Coefficients, Distiller, coefficients_at
from student.loop.fault_points import fault_point
from student.loop.optimizer import learning_rate_schedule, make_optimizer, set_learning_rate
from student.loop.resume import collect_state_dicts, load_latest_on_all_ranks, load_state_dicts
from student.loop.setup import make_collate_spec, make_distiller
from student.loop.step import StepResult, take_step
from student.loop.worker_group import WorkerGroup
from student.release.final import write_final
from student.tracking.progress import StepReport
from student.tracking.step_recorder import StepRecorder, memory_bytes, resident_bytes
from student.training_job import TrainingJob, package_versions, training_identity

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunCallbacks:
    """What a rank calls while it trains."""

    on_checkpoint: Callable[[dict[str, float]], None]
    """Receives metrics at every checkpoint, on every rank; `ray.train.report` on a Ray worker."""
    on_step: Callable[[StepReport], None]
    """Receives finished steps, on rank 0."""
    step_every_s: float = HEARTBEAT_S
    """Seconds between two calls of `on_step`; 0 reports every step."""


def train_rank(job: TrainingJob, group: WorkerGroup, callbacks: RunCallbacks) -> None:
    """Train from the latest checkpoint to the end, then write the final weights and `train.json`.

    Raises TrainingError if a loss or the gradient is not finite, and the errors of reading, building and writing.
    """
    training, caches, initial_rss_bytes = job.recipe.training, job.caches(), resident_bytes()
    dataset = make_dataset(job, caches)
    batch_sampler = make_batch_sampler(job, dataset)
    distiller = make_distiller(job, caches, dataset, batch_sampler, group.device)
    module = group.parallelize(distiller, training.parallel, distiller.student.layers)
    optimizer = make_optimizer(distiller, training)
    rate_at = learning_rate_schedule(training, len(batch_sampler))
    progress = resume(job, distiller, optimizer, group)
    recorder = _make_recorder(job, len(batch_sampler), progress.step, group, callbacks)
    writer = CheckpointWriter(job.store, training.keep_checkpoints)
    spec = make_collate_spec(job, caches, distiller)
    loader = PrefetchLoader(dataset, batch_sampler, spec, group, progress.step, job.seed)
    try:
        for loaded in loader:
            number = loaded.step.number
            fault_point("before_step", number, group.rank)
            coefficients = (
                Coefficients() if job.arm == "control" else coefficients_at(training, number, len(batch_sampler))
            )
            set_learning_rate(optimizer, rate_at(number))
            inputs = loaded.step, loaded.batches, coefficients
            result = take_step(module, optimizer, *inputs, training.clip_norm, group, dataset.sequence_id)
            fault_point("after_step", number, group.rank)
            progress.advance(result)
            if recorder is not None:
                metrics = _used_parts(coefficients, result) | {"learning_rate": rate_at(number)}
                recorder.write(loaded, result, metrics, progress.tokens)
            if progress.step % training.checkpoint_every_steps == 0 and progress.step < len(batch_sampler):
                state_dicts = collect_state_dicts(distiller, optimizer, group)
                if recorder is not None and state_dicts is not None:
                    writer.save(Snapshot(progress.step, progress.to_json(job), state_dicts), recorder.contents())
                callbacks.on_checkpoint({"step": progress.step, "loss": result.loss})
        writer.wait()
    finally:
        loader.close()
        writer.close()
        if recorder is not None:
            recorder.close()
    write_final(job.store, distiller.student.model, caches[0], group, progress.step)
    _finish(job, caches, progress, group, process_statistics(group, initial_rss_bytes))


@dataclass
class TrainingProgress:
    """The part of a training's state that is not tensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Training time of all attempts, up to the checkpoint that the next one started from."""
    loss: float = float("nan")
    _last_s: float = field(default_factory=time.monotonic)

    def advance(self, result: StepResult) -> None:
        """Count a finished step."""
        now_s = time.monotonic()
        self.seconds += now_s - self._last_s
        self._last_s = now_s
        self.step += 1
        self.tokens += result.tokens
        self.loss = result.loss

    def to_json(self, job: TrainingJob) -> dict[str, Any]:
        """JSON values of a checkpoint's marker."""
        return {"tokens": self.tokens, "seconds": round(self.seconds, 3), "seed": job.seed, "loss": self.loss}


def resume(
    job: TrainingJob, distiller: Distiller, optimizer: torch.optim.Optimizer, group: WorkerGroup
) -> TrainingProgress:
    """Load the latest complete checkpoint, if there is one. Collective."""
    snapshot = load_latest_on_all_ranks(job.store, group)
    progress = TrainingProgress()
    if snapshot is None:
        return progress
    fault_point("mid_resume", snapshot.step, group.rank)
    load_state_dicts(distiller, optimizer, snapshot)
    saved = snapshot.progress
    progress.step, progress.tokens, progress.seconds = snapshot.step, saved["tokens"], saved["seconds"]
    progress.loss = saved["loss"]
    if group.is_main_process:
        logger.info("%s: resumes after step %d", job.title, progress.step)
    return progress


def _make_recorder(
    job: TrainingJob, steps: int, first_step: int, group: WorkerGroup, callbacks: RunCallbacks
) -> StepRecorder | None:
    if not group.is_main_process:
        return None
    return StepRecorder(job, steps, first_step, group.device, callbacks.on_step, callbacks.step_every_s)


def _used_parts(coefficients: Coefficients, result: StepResult) -> dict[str, float]:
    """Losses whose coefficient is not 0 in this step, and always the cross-entropy."""
    return {name: part for name, part in result.parts.items() if name == "ce" or getattr(coefficients, name) != 0.0}


REPORTED_PACKAGES = ("actors", "ray", "torch", "transformers", "vllm")
"""Packages that `train.json` lists where a rank has imported them: no rank may import vllm or actors."""


def process_statistics(group: WorkerGroup, initial_rss_bytes: int) -> list[dict[str, Any]]:
    """Memory and imported packages of every rank's process. Collective.

    `initial_rss_bytes`: resident set size of this process before it read a cache or built a model.
    """
    statistics = {
        "modules": [name for name in REPORTED_PACKAGES if name in sys.modules],
        "bare_rss_bytes": initial_rss_bytes,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "memory_bytes": memory_bytes(group.device),
    }
    return group.all_gather(statistics)


def _finish(
    job: TrainingJob,
    caches: Sequence[CacheReader],
    progress: TrainingProgress,
    group: WorkerGroup,
    ranks: list[dict[str, Any]],
) -> None:
    """Write `train.json` and delete the checkpoints on rank 0, while the others wait."""
    if group.is_main_process:
        fault_point("before_record", progress.step, group.rank)
        job.store.put(TRAIN_JSON, json.dumps(_train_json(job, caches, progress, ranks), indent=2).encode())
        fault_point("after_record", progress.step, group.rank)
        delete_all_checkpoints(job.store)
    group.barrier()


def _train_json(
    job: TrainingJob, caches: Sequence[CacheReader], progress: TrainingProgress, ranks: list[dict[str, Any]]
) -> dict[str, Any]:
    identity = training_identity(job, caches)
    return {
        "fingerprint": fingerprint(identity),
        "identity": identity,
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "loss": progress.loss,
        "world": len(ranks),
        "ranks": ranks,
        "peak_rss_bytes": max(rank["peak_rss_bytes"] for rank in ranks),
        "versions": package_versions(),
    }
