"""The optimizer: which parameters it holds, how its learning rate moves, and how a gradient is clipped."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from pipeline.config import TrainingSpec

DECAY_SHARE = 0.2
"""`warmup_stable_decay`: share of the steps, at the end, over which the learning rate falls."""


def make_optimizer(module: nn.Module, training: TrainingSpec) -> torch.optim.Optimizer:
    """AdamW over all that is trained; vectors (norms, biases) are not decayed."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = not any(isinstance(parameter, DTensor) for parameter in trained)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=training.learning_rate, betas=training.betas, fused=fused
    )


def learning_rates(training: TrainingSpec, steps: int) -> Callable[[int], float]:
    """The learning rate by step: a schedule of transformers, as a function without state.

    Taken at the middle of each step, so that neither a warm-up's first step nor a decay's last is spent at rate 0.
    """
    scheduler = get_scheduler(
        training.scheduler,
        torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate),
        num_warmup_steps=round(training.warmup * steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=_specific(training, steps),
    )
    factor = scheduler.lr_lambdas[0]
    return lambda step: training.learning_rate * float(factor(step + 0.5))


def _specific(training: TrainingSpec, steps: int) -> dict[str, int]:
    return {"num_decay_steps": round(DECAY_SHARE * steps)} if training.scheduler == "warmup_stable_decay" else {}


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """One rate for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip(parameters: Iterable[nn.Parameter], limit: float | None) -> float:
    """The gradient's norm over all parameters; the gradient is scaled down to `limit` where it is larger."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
