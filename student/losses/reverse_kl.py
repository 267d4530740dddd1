"""Reverse KL(q || p): the student goes where the teacher is sure. Coarse, over K + 1 buckets."""

import math

import torch
from torch import Tensor

from student.losses.buckets import DivergenceSettings, kl

TAIL_FLOOR = 1e-6
"""The teacher's tail counts as at least this much: a mass of 0 there would make the loss infinite."""


def reverse_kl(student_CB: Tensor, teacher_CB: Tensor, settings: DivergenceSettings) -> Tensor:
    """KL(q || p) with the teacher's tail bucket held at TAIL_FLOOR or above."""
    return kl(student_CB, with_tail_floor(teacher_CB))


def with_tail_floor(teacher_CB: Tensor) -> Tensor:
    """The teacher with its last bucket at TAIL_FLOOR or above."""
    tail_C1 = teacher_CB[:, -1:].clamp_min(math.log(TAIL_FLOOR))
    return torch.cat([teacher_CB[:, :-1], tail_C1], dim=1)
