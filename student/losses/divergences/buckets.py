"""The shape that every loss between output distributions has: two distributions over B = K + 1 buckets.

Bucket i < K is the teacher's i-th entry, bucket K is all the rest of the vocabulary. Both sides are natural
log-probabilities. What is not there (padding, a tail of mass 0) stands at ABSENT: finite, so that 0 * log 0 is 0 and
every gradient is finite, and so low that its exponential is exactly 0.

A loss is a pure function `(student_RJ, teacher_RJ, settings) -> loss_R`, one value a row. It is differentiated by
autograd on these small tensors; `student.head.chunked` carries the gradient on to the logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

ABSENT = -1.0e4


@dataclass(frozen=True, slots=True)
class DivergenceSettings:
    """The numbers that some losses take."""

    beta: float = 0.5
    """Weight of the teacher in the mixture of the generalised Jensen-Shannon divergence."""
    skew: float = 0.1
    """Share of one's own side in the mixture of the skewed divergences."""


BucketLoss: TypeAlias = Callable[[Tensor, Tensor, DivergenceSettings], Tensor]


def kl(left_RJ: Tensor, right_RJ: Tensor) -> Tensor:
    """KL(left || right) a row, in nats: sum_b exp(left_b) (left_b - right_b)."""
    return (left_RJ.exp() * (left_RJ - right_RJ)).sum(dim=1)


def mixture(left_RJ: Tensor, right_RJ: Tensor, share: float) -> Tensor:
    """log(share * exp(left) + (1 - share) * exp(right)) for 0 < share < 1, in log space."""
    log_share = torch.log(left_RJ.new_tensor([share, 1.0 - share]))
    return torch.logaddexp(left_RJ + log_share[0], right_RJ + log_share[1])
