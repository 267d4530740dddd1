"""Adaptive KL (Wu et al. 2024, AKL): forward and reverse KL, weighted by the gaps in the head and in the rest."""

import torch
from torch import Tensor

from student.losses.divergences.buckets import DivergenceSettings, kl
from student.losses.divergences.reverse_kl import with_tail_floor

HEAD_MASS = 0.5
"""The teacher's head is the shortest prefix of its entries with at least this mass."""


def adaptive_kl(student_RJ: Tensor, teacher_RJ: Tensor, settings: DivergenceSettings) -> Tensor:
    """(g_head KL(p||q) + g_tail KL(q||p)) / (g_head + g_tail), g = sum |p - q| over head or rest.

    The tail bucket belongs to the rest, with one gap for its total mass. No gradient flows through the weights g.
    """
    forward_R, reverse_R = kl(teacher_RJ, student_RJ), kl(student_RJ, with_tail_floor(teacher_RJ))
    head_R, rest_R = _gaps(student_RJ.detach(), teacher_RJ)
    share_R = head_R / (head_R + rest_R).clamp_min(torch.finfo(head_R.dtype).tiny)
    return share_R * forward_R + (1.0 - share_R) * reverse_R


def _gaps(student_RJ: Tensor, teacher_RJ: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of |p - q| over the teacher's head, and over the rest."""
    teacher_mass_RJ = teacher_RJ.exp()
    gap_RJ = (teacher_mass_RJ - student_RJ.exp()).abs()
    in_head_RJ = teacher_mass_RJ.cumsum(dim=1) - teacher_mass_RJ < HEAD_MASS
    in_head_RJ[:, -1] = False
    head_R = (gap_RJ * in_head_RJ).sum(dim=1)
    return head_R, gap_RJ.sum(dim=1) - head_R
