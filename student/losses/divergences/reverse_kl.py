"""Reverse KL(q || p): the student goes where the teacher is sure. Coarse, over K + 1 buckets."""

import math

import torch
from torch import Tensor

from student.losses.divergences.buckets import DivergenceSettings, kl

TAIL_FLOOR = 1e-6
"""The teacher's tail counts as at least this much: a mass of 0 there would make the loss infinite."""


def reverse_kl(student_RJ: Tensor, teacher_RJ: Tensor, settings: DivergenceSettings) -> Tensor:
    """KL(q || p) with the teacher's tail bucket held at TAIL_FLOOR or above."""
    return kl(student_RJ, with_tail_floor(teacher_RJ))


def with_tail_floor(teacher_RJ: Tensor) -> Tensor:
    """The teacher with its last bucket at TAIL_FLOOR or above."""
    tail_R1 = teacher_RJ[:, -1:].clamp_min(math.log(TAIL_FLOOR))
    return torch.cat([teacher_RJ[:, :-1], tail_R1], dim=1)
