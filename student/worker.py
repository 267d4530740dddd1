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
from pipeline.outputs import TRAIN_JSON
from pipeline.progress import HEARTBEAT_S
from student.catalog import make_order, make_rows
from student.checkpoint import CheckpointWriter, Snapshot, clear
from student.distil import Coefficients, Distiller, coefficients_at
from student.faults import reach
from student.final import write_final
from student.group import Group
from student.job import Told, training_identity, versions
from student.journal import Journal, memory_bytes, resident_bytes
from student.optimise import learning_rates, make_optimizer, set_learning_rate
from student.resume import agreed_snapshot, restore, sections_of
from student.setup import make_distiller, make_reading
from student.step import StepResult, take_step
from student.stream import BatchStream


@dataclass(frozen=True)
class Outside:
    """Whom a rank talks to while it trains."""

    say: Callable[[str], None]
    """Takes a line for the user; only the leading rank has any."""
    report: Callable[[dict[str, float]], None]
    """Hears of every checkpoint, on every rank."""
    line_every_s: float = HEARTBEAT_S
    """How fresh the last step's line may be when the next one is said; 0 where somebody looks on."""


def train_rank(told: Told, group: Group, outside: Outside) -> None:
    """Train the student from wherever its newest checkpoint left it.

    Raises what anything that it uses raises; TrainingError where a loss is not finite.
    """
    training, caches, bare_bytes = told.recipe.training, told.caches(), resident_bytes()
    rows = make_rows(told, caches)
    order = make_order(told, rows)
    distiller = make_distiller(told, caches, rows, order, group.device)
    module = group.share(distiller, training.parallel, distiller.student.layers)
    optimizer = make_optimizer(distiller, training)
    rate_at = learning_rates(training, order.steps)
    progress = resume(told, distiller, optimizer, group, outside.say)
    journal = _journal(told, order.steps, progress.step, group, outside) if group.leads else None
    writer = CheckpointWriter(told.store, training.keep_checkpoints, outside.say)
    stream = BatchStream(rows, order, make_reading(told, caches, distiller), group, progress.step, told.seed)
    try:
        for loaded in stream:
            number = loaded.step.number
            reach("before_step", number, group.rank)
            coefficients = _coefficients(told, number, order.steps)
            set_learning_rate(optimizer, rate_at(number))
            result = take_step(
                module,
                optimizer,
                loaded.step,
                loaded.batches,
                coefficients,
                training.clip_norm,
                group,
                rows.sequence_id,
            )
            reach("after_step", number, group.rank)
            progress.advance(result)
            if journal is not None:
                shown = _shown(coefficients, result) | {"learning_rate": rate_at(number)}
                journal.write(loaded, result, shown, progress.tokens)
            if progress.step % training.checkpoint_every_steps == 0 and progress.step < order.steps:
                sections = sections_of(distiller, optimizer, group)
                if journal is not None and sections is not None:
                    writer.save(Snapshot(progress.step, progress.state(told), sections), journal.contents())
                outside.report({"step": progress.step, "loss": result.loss})
        writer.wait()
    finally:
        stream.close()
        writer.close()
        if journal is not None:
            journal.close()
    write_final(told.store, distiller.student.model, caches[0], group, progress.step)
    ranks = seen_inside(group, bare_bytes)
    if group.leads:
        reach("before_record", progress.step, group.rank)
        told.store.put(TRAIN_JSON, json.dumps(_record(told, caches, progress, ranks), indent=2).encode())
        reach("after_record", progress.step, group.rank)
        clear(told.store)
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

    def state(self, told: Told) -> dict[str, Any]:
        """What a checkpoint keeps beside tensors."""
        return {"tokens": self.tokens, "seconds": round(self.seconds, 3), "seed": told.seed, "loss": self.loss}


def resume(
    told: Told, distiller: Distiller, optimizer: torch.optim.Optimizer, group: Group, say: Callable[[str], None]
) -> Progress:
    """Put the newest whole checkpoint back, if there is one. What is passed over is said in one line each."""
    snapshot = agreed_snapshot(told.store, group, say)
    progress = Progress(_resumed_s=time.monotonic())
    if snapshot is None:
        return progress
    reach("mid_resume", snapshot.step, group.rank)
    restore(distiller, optimizer, snapshot)
    state = snapshot.state
    progress.step, progress.tokens = snapshot.step, state["tokens"]
    progress.seconds, progress.loss = state["seconds"], state["loss"]
    if group.leads:
        say(f"{told.title}: goes on after step {progress.step}")
    return progress


def _journal(told: Told, steps: int, first_step: int, group: Group, outside: Outside) -> Journal:
    return Journal(told, steps, first_step, group.device, outside.say, outside.line_every_s)


def _coefficients(told: Told, step: int, steps: int) -> Coefficients:
    return Coefficients() if told.arm == "control" else coefficients_at(told.recipe.training, step, steps)


def _shown(coefficients: Coefficients, result: StepResult) -> dict[str, float]:
    """The parts that count in this step, and the label's cross-entropy always."""
    return {name: part for name, part in result.parts.items() if name == "ce" or getattr(coefficients, name) != 0.0}


WATCHED = ("actors", "ray", "torch", "transformers", "vllm")
"""Packages whose presence in a training's process tells what it could hold."""


def seen_inside(group: Group, bare_bytes: int) -> list[dict[str, Any]]:
    """What every rank's process holds, seen from inside of it. Every rank must call this.

    `bare_bytes` is what this one held when it began, with nothing but its libraries.
    """
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    loaded = {name.partition(".")[0] for name in sys.modules}
    figures_RF = torch.zeros(group.world, 3 + len(WATCHED), dtype=torch.float64)
    mine = [bare_bytes, peak_bytes, memory_bytes(group.device), *(name in loaded for name in WATCHED)]
    figures_RF[group.rank] = torch.tensor(mine, dtype=torch.float64)
    return [
        {
            "modules": [name for name, there in zip(WATCHED, row[3:], strict=True) if there],
            "bare_rss_bytes": int(row[0]),
            "peak_rss_bytes": int(row[1]),
            "memory_bytes": int(row[2]),
        }
        for row in group.sum(figures_RF).tolist()
    ]


def _record(
    told: Told, caches: Sequence[CacheReader], progress: Progress, ranks: list[dict[str, Any]]
) -> dict[str, Any]:
    """What `train.json` says of a finished training."""
    identity = training_identity(told, caches)
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
        "versions": versions(),
    }
