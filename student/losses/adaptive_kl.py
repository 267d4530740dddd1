"""Adaptive KL (Wu et al. 2024): forward and reverse KL, weighed by where student and teacher differ more."""

import torch
from torch import Tensor

from student.losses.buckets import DivergenceSettings, kl
from student.losses.reverse_kl import with_tail_floor

HEAD_MASS = 0.5
"""The teacher's head: its largest entries until they hold this much."""


def adaptive_kl(student_CB: Tensor, teacher_CB: Tensor, settings: DivergenceSettings) -> Tensor:
    """(g_head KL(p||q) + g_tail KL(q||p)) / (g_head + g_tail), g = sum |p - q| over head or rest.

    The tail bucket's gap counts as one block, and the gaps are weights: no gradient goes through them.
    """
    forward_C, reverse_C = kl(teacher_CB, student_CB), kl(student_CB, with_tail_floor(teacher_CB))
    head_C, rest_C = _gaps(student_CB.detach(), teacher_CB)
    share_C = head_C / (head_C + rest_C).clamp_min(torch.finfo(head_C.dtype).tiny)
    return share_C * forward_C + (1.0 - share_C) * reverse_C


def _gaps(student_CB: Tensor, teacher_CB: Tensor) -> tuple[Tensor, Tensor]:
    """Summed |p - q| in the teacher's head, and in the rest."""
    teacher_mass_CB = teacher_CB.exp()
    gap_CB = (teacher_mass_CB - student_CB.exp()).abs()
    in_head_CB = teacher_mass_CB.cumsum(dim=1) - teacher_mass_CB < HEAD_MASS
    in_head_CB[:, -1] = False
    head_C = (gap_CB * in_head_CB).sum(dim=1)
    return head_C, gap_CB.sum(dim=1) - head_C
