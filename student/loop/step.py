"""One training step: from packed micro-batches to new weights.

The loss of a step is the exact mean over its tokens, whichever rank and micro-batch they lie in: every micro-batch
gives sums, and all are divided by the weight of the whole step. Nothing is updated once anything is not finite.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.errors import TrainingError
from student.data.batch_sampler import Step
from student.data.collate import MicroBatch
from student.loop.distiller import PARTS, Coefficients, Distiller
from student.loop.fault_points import fault_point
from student.loop.optimizer import clip
from student.loop.worker_group import WorkerGroup, no_grad_sync


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step came to. Means are per token of the step, over all ranks."""

    loss: float
    parts: dict[str, float]
    """`kd`, `ce`, `feature`, `relation`: means without their coefficients."""
    gradient_norm: float
    tokens: int


def take_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Step,
    batches: Sequence[MicroBatch],
    coefficients: Coefficients,
    clip_norm: float | None,
    group: WorkerGroup,
    name_of: Callable[[int], str],
) -> StepResult:
    """Forward and backward over this rank's micro-batches, then one update.

    `module` is a Distiller, wrapped by `Group.share`; every rank passes `step.turns(world)` batches. `name_of`: a
    sequence's id by its number. Raises TrainingError, before any weight changes, when a loss or the gradient is not
    finite.
    """
    weight, tokens = _counts(batches, group)
    distiller = next(inner for inner in module.modules() if isinstance(inner, Distiller))
    sums_BP = torch.zeros(len(step.micro_batches), 1 + len(PARTS), dtype=torch.float64, device=group.device)
    for turn, batch in enumerate(batches):
        torch.manual_seed(
            batch.seed + (batch.number or 0)
        )  # dropout, where a student has it, is the same again after a resume
        with no_grad_sync(module, turn < len(batches) - 1):
            total, parts_P = module(batch, coefficients)
            (total * (group.world / weight)).backward()
        if batch.number is not None:
            sums_BP[batch.number] = torch.cat([total.detach()[None], parts_P]).double()
        fault_point("mid_step", step.number, group.rank)
    sums_BP = group.sum(sums_BP)
    _stop_unless_finite(sums_BP, step, name_of)
    norm = clip(module.parameters(), clip_norm)
    if not math.isfinite(norm):
        raise TrainingError(f"step {step.number}: expected a finite gradient, got norm {norm}; lower the learning rate")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    means_P = (sums_BP.sum(dim=0) / weight).tolist()
    parts = dict(zip(PARTS, means_P[1:], strict=True))
    distiller.rebalance(parts, coefficients)
    return StepResult(means_P[0], parts, norm, tokens)


def _counts(batches: Sequence[MicroBatch], group: WorkerGroup) -> tuple[float, int]:
    """Weight and tokens of the whole step. A step in which no label counts has weight 1, and zero gradients."""
    weight = sum(float(batch.targets.weight_T.sum()) for batch in batches)
    sums = group.sum(torch.tensor([weight, sum(batch.tokens for batch in batches)], dtype=torch.float64)).tolist()
    return sums[0] or 1.0, int(sums[1])


def _stop_unless_finite(sums_BP: Tensor, step: Step, name_of: Callable[[int], str]) -> None:
    for number, finite in enumerate(sums_BP.isfinite().all(dim=1).tolist()):
        if not finite:
            names = ", ".join(name_of(index) for index in step.micro_batches[number])
            got = dict(zip(("loss", *PARTS), sums_BP[number].tolist(), strict=True))
            raise TrainingError(f"step {step.number}: expected finite losses, got {got}; sequences {names}")
