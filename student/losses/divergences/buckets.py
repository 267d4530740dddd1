"""The signature of every divergence: two distributions over J = K + 1 buckets, as natural log-probabilities.

Bucket i < K is the teacher's i-th entry, bucket K (the tail) is the rest of the vocabulary. An empty bucket (padding, a
tail of mass 0) has the log-probability ABSENT on both sides: finite, so that 0 * log 0 is 0 and every gradient is
finite, and so low that its exponential is exactly 0.

A divergence is a pure function `(student_RJ, teacher_RJ, settings) -> loss_R`. Autograd differentiates it on these
small tensors; `student.head.chunked` propagates the gradient to the logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

ABSENT = -1.0e4


@dataclass(frozen=True, slots=True)
class DivergenceSettings:
    """Hyperparameters of some divergences (`training.distribution`)."""

    beta: float = 0.5
    """Weight of the teacher in the mixture of the generalised Jensen-Shannon divergence."""
    skew: float = 0.1
    """Weight of the KL's left side in the mixture of the skewed divergences, 0 < skew < 1."""


BucketLoss: TypeAlias = Callable[[Tensor, Tensor, DivergenceSettings], Tensor]


def kl(left_RJ: Tensor, right_RJ: Tensor) -> Tensor:
    """Return KL(left || right) per row in nats: sum_j exp(left_j) (left_j - right_j)."""
    return (left_RJ.exp() * (left_RJ - right_RJ)).sum(dim=1)


def mixture(left_RJ: Tensor, right_RJ: Tensor, share: float) -> Tensor:
    """Return log(share * exp(left) + (1 - share) * exp(right)) for 0 < share < 1, without overflow."""
    log_share = torch.log(left_RJ.new_tensor([share, 1.0 - share]))
    return torch.logaddexp(left_RJ + log_share[0], right_RJ + log_share[1])
