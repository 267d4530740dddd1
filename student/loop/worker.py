"""What one rank does, from an empty process to trained weights. Knows nothing of Ray and nothing of teachers."""

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.cache.reader import CacheReader
from pipeline.identity import fingerprint
from pipeline.run.outputs import TRAIN_JSON
from pipeline.run.progress import HEARTBEAT_S
from student.data.dataset import make_batch_sampler, make_dataset
from student.data.prefetch import PrefetchLoader
from student.loop.checkpoint import CheckpointWriter, Snapshot, clear
from student.loop.distiller import Coefficients, Distiller, coefficients_at
from student.loop.fault_points import fault_point
from student.loop.optimizer import learning_rates, make_optimizer, set_learning_rate
from student.loop.resume import agreed_snapshot, restore, sections_of
from student.loop.setup import make_collate_spec, make_distiller
from student.loop.step import StepResult, take_step
from student.loop.worker_group import WorkerGroup
from student.release.final import write_final
from student.tracking.journal import Journal, memory_bytes, resident_bytes
from student.training_job import TrainingJob, package_versions, training_identity


@dataclass(frozen=True)
class RunCallbacks:
    """Whom a rank talks to while it trains."""

    say: Callable[[str], None]
    """Takes a line for the user; only the leading rank has any."""
    report: Callable[[dict[str, float]], None]
    """Hears of every checkpoint, on every rank."""
    line_every_s: float = HEARTBEAT_S
    """How fresh the last step's line may be when the next one is said; 0 where somebody looks on."""


def train_rank(job: TrainingJob, group: WorkerGroup, outside: RunCallbacks) -> None:
    """Train the student from wherever its newest checkpoint left it.

    Raises what anything that it uses raises; TrainingError where a loss is not finite.
    """
    training, caches, bare_bytes = job.recipe.training, job.caches(), resident_bytes()
    dataset = make_dataset(job, caches)
    batch_sampler = make_batch_sampler(job, dataset)
    distiller = make_distiller(job, caches, dataset, batch_sampler, group.device)
    module = group.parallelize(distiller, training.parallel, distiller.student.layers)
    optimizer = make_optimizer(distiller, training)
    rate_at = learning_rates(training, len(batch_sampler))
    progress = resume(job, distiller, optimizer, group, outside.say)
    journal = _journal(job, len(batch_sampler), progress.step, group, outside) if group.leads else None
    writer = CheckpointWriter(job.store, training.keep_checkpoints, outside.say)
    stream = PrefetchLoader(
        dataset, batch_sampler, make_collate_spec(job, caches, distiller), group, progress.step, job.seed
    )
    try:
        for loaded in stream:
            number = loaded.step.number
            fault_point("before_step", number, group.rank)
            coefficients = _coefficients(job, number, len(batch_sampler))
            set_learning_rate(optimizer, rate_at(number))
            result = take_step(
                module,
                optimizer,
                loaded.step,
                loaded.batches,
                coefficients,
                training.clip_norm,
                group,
                dataset.sequence_id,
            )
            fault_point("after_step", number, group.rank)
            progress.advance(result)
            if journal is not None:
                shown = _shown(coefficients, result) | {"learning_rate": rate_at(number)}
                journal.write(loaded, result, shown, progress.tokens)
            if progress.step % training.checkpoint_every_steps == 0 and progress.step < len(batch_sampler):
                sections = sections_of(distiller, optimizer, group)
                if journal is not None and sections is not None:
                    writer.save(Snapshot(progress.step, progress.state(job), sections), journal.contents())
                outside.report({"step": progress.step, "loss": result.loss})
        writer.wait()
    finally:
        stream.close()
        writer.close()
        if journal is not None:
            journal.close()
    write_final(job.store, distiller.student.model, caches[0], group, progress.step)
    ranks = seen_inside(group, bare_bytes)
    if group.leads:
        fault_point("before_record", progress.step, group.rank)
        job.store.put(TRAIN_JSON, json.dumps(_record(job, caches, progress, ranks), indent=2).encode())
        fault_point("after_record", progress.step, group.rank)
        clear(job.store)
    group.wait_for_all()


@dataclass
class Progress:
    """How far a training is. Readable, and all of it that is not tensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Over all attempts, as far as checkpoints kept them."""
    loss: float = float("nan")
    _resumed_s: float = 0.0

    def advance(self, result: StepResult) -> None:
        """One more step is done."""
        now_s = time.monotonic()
        self.seconds += now_s - self._resumed_s
        self._resumed_s = now_s
        self.step += 1
        self.tokens += result.tokens
        self.loss = result.loss

    def state(self, job: TrainingJob) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors."""
        return {"tokens": self.tokens, "seconds": round(self.seconds, 3), "seed": job.seed, "loss": self.loss}


def resume(
    job: TrainingJob,
    distiller: Distiller,
    optimizer: torch.optim.Optimizer,
    group: WorkerGroup,
    say: Callable[[str], None],
) -> Progress:
    """Put the newest whole checkpoint back, if there is one. What is passed over is said in one line each."""
    snapshot = agreed_snapshot(job.store, group, say)
    progress = Progress(_resumed_s=time.monotonic())
    if snapshot is None:
        return progress
    fault_point("mid_resume", snapshot.step, group.rank)
    restore(distiller, optimizer, snapshot)
    state = snapshot.state
    progress.step, progress.tokens = snapshot.step, state["tokens"]
    progress.seconds, progress.loss = state["seconds"], state["loss"]
    if group.leads:
        say(f"{job.title}: goes on after step {progress.step}")
    return progress


def _journal(job: TrainingJob, steps: int, first_step: int, group: WorkerGroup, outside: RunCallbacks) -> Journal:
    return Journal(job, steps, first_step, group.device, outside.say, outside.line_every_s)


def _coefficients(job: TrainingJob, step: int, steps: int) -> Coefficients:
    return Coefficients() if job.arm == "control" else coefficients_at(job.recipe.training, step, steps)


def _shown(coefficients: Coefficients, result: StepResult) -> dict[str, float]:
    """The parts that count in this step, and the label's cross-entropy always."""
    return {name: part for name, part in result.parts.items() if name == "ce" or getattr(coefficients, name) != 0.0}


WATCHED = ("actors", "ray", "torch", "transformers", "vllm")
"""Packages whose presence in a training's process tells what it could hold."""


def seen_inside(group: WorkerGroup, bare_bytes: int) -> list[dict[str, Any]]:
    """What every rank's process holds, seen from inside of it. Every rank must call this.

    `bare_bytes` is what this one held when it began, with nothing but its libraries.
    """
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    loaded = {name.partition(".")[0] for name in sys.modules}
    figures = torch.zeros(group.world, 3 + len(WATCHED), dtype=torch.float64)
    mine = [bare_bytes, peak_bytes, memory_bytes(group.device), *(name in loaded for name in WATCHED)]
    figures[group.rank] = torch.tensor(mine, dtype=torch.float64)
    return [
        {
            "modules": [name for name, there in zip(WATCHED, row[3:], strict=True) if there],
            "bare_rss_bytes": int(row[0]),
            "peak_rss_bytes": int(row[1]),
            "memory_bytes": int(row[2]),
        }
        for row in group.sum(figures).tolist()
    ]


def _record(
    job: TrainingJob, caches: Sequence[CacheReader], progress: Progress, ranks: list[dict[str, Any]]
) -> dict[str, Any]:
    """What `train.json` says of a finished training."""
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
