"""AdamW, its learning rate schedule, and gradient clipping."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import get_scheduler

from pipeline.config import TrainingSpec

DECAY_SHARE = 0.2
"""`warmup_stable_decay`: share of the steps, at the end, in which the learning rate decays."""


def make_optimizer(module: nn.Module, training: TrainingSpec) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, without weight decay for vectors (norms, biases)."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = not any(isinstance(parameter, DTensor) for parameter in trained)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=training.learning_rate, betas=training.betas, fused=fused
    )


def learning_rate_schedule(training: TrainingSpec, steps: int) -> Callable[[int], float]:
    """Function from step number to learning rate, by a schedule of transformers.

    Evaluated at the middle of each step: neither the first step of a warm-up nor the last of a decay has rate 0.
    """
    options = {"num_decay_steps": round(DECAY_SHARE * steps)} if training.scheduler == "warmup_stable_decay" else {}
    scheduler = get_scheduler(
        training.scheduler,
        torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate),
        num_warmup_steps=round(training.warmup * steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=options,
    )
    factor = scheduler.lr_lambdas[0]
    return lambda step: training.learning_rate * float(factor(step + 0.5))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float | None) -> float:
    """Scale the gradient down to `max_norm` if it is larger; return its total norm before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
