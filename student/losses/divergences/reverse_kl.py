"""Reverse KL(q || p): mode-seeking. Over buckets it is a lower bound of the full reverse KL."""

import math

import torch
from torch import Tensor

from student.losses.divergences.buckets import DivergenceSettings, kl

TAIL_FLOOR = 1e-6
"""Least mass of the teacher's tail: 0 would make the loss infinite."""


def reverse_kl(student_RJ: Tensor, teacher_RJ: Tensor, settings: DivergenceSettings) -> Tensor:
    """KL(q || p), with the teacher's tail at TAIL_FLOOR or above."""
    return kl(student_RJ, with_tail_floor(teacher_RJ))


def with_tail_floor(teacher_RJ: Tensor) -> Tensor:
    """Return the teacher with its tail bucket raised to at least TAIL_FLOOR."""
    tail_R1 = teacher_RJ[:, -1:].clamp_min(math.log(TAIL_FLOOR))
    return torch.cat([teacher_RJ[:, :-1], tail_R1], dim=1)
