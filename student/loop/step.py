"""One optimizer step: gradient accumulation over micro-batches and ranks, clipping, update.

The loss of a step is the exact mean over its tokens, for any packing and number of ranks: the sums of all micro-batches
are divided by the global weight of the step. No weight changes if a loss or the gradient is not finite.
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
from student.loop.optimizer import clip_grad_norm_
from student.loop.worker_group import WorkerGroup, no_grad_sync


@dataclass(frozen=True, slots=True)
class StepResult:
    """Results of a step. Losses are means over the weighted labels of all ranks."""

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
    sequence_id_of: Callable[[int], str],
) -> StepResult:
    """Run forward and backward over this rank's micro-batches, then one update.

    `module` is a Distiller wrapped by `WorkerGroup.parallelize`; every rank passes `step.micro_steps_per_rank` batches.
    `sequence_id_of` maps a sequence's number to its id, for messages. Raises TrainingError, before any weight changes,
    if a loss or the gradient is not finite.
    """
    weight, tokens = _global_weight_and_tokens(batches, group)
    distiller = next(inner for inner in module.modules() if isinstance(inner, Distiller))
    sums_BP = torch.zeros(len(step.micro_batches), 1 + len(PARTS), dtype=torch.float64, device=group.device)
    for index, batch in enumerate(batches):
        torch.manual_seed(batch.seed + (batch.number or 0))  # dropout is reproducible after a resume
        with no_grad_sync(module, enabled=index < len(batches) - 1):
            total, parts_P = module(batch, coefficients)
            (total * (group.world_size / weight)).backward()
        if batch.number is not None:
            sums_BP[batch.number] = torch.cat([total.detach()[None], parts_P]).double()
        fault_point("mid_step", step.number, group.rank)
    sums_BP = group.all_reduce_sum(sums_BP)
    _check_finite(sums_BP, step, sequence_id_of)
    norm = clip_grad_norm_(module.parameters(), clip_norm)
    if not math.isfinite(norm):
        raise TrainingError(f"step {step.number}: expected a finite gradient, got norm {norm}; lower the learning rate")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    means_P = (sums_BP.sum(dim=0) / weight).tolist()
    parts = dict(zip(PARTS, means_P[1:], strict=True))
    distiller.rebalance(parts, coefficients)
    return StepResult(means_P[0], parts, norm, tokens)


def _global_weight_and_tokens(batches: Sequence[MicroBatch], group: WorkerGroup) -> tuple[float, int]:
    """Sums over all ranks. The weight is 1 where all labels are masked: losses and gradients are 0 then."""
    weight = sum(float(batch.targets.weight_T.sum()) for batch in batches)
    sums = group.all_reduce_sum(
        torch.tensor([weight, sum(batch.tokens for batch in batches)], dtype=torch.float64)
    ).tolist()
    return sums[0] or 1.0, int(sums[1])


def _check_finite(sums_BP: Tensor, step: Step, sequence_id_of: Callable[[int], str]) -> None:
    for number, finite in enumerate(sums_BP.isfinite().all(dim=1).tolist()):
        if not finite:
            names = ", ".join(sequence_id_of(index) for index in step.micro_batches[number])
            got = dict(zip(("loss", *PARTS), sums_BP[number].tolist(), strict=True))
            raise TrainingError(f"step {step.number}: expected finite losses, got {got}; sequences {names}")
