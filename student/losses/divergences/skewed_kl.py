"""Skewed KL (Ko et al. 2024, DistiLLM): the right side is a mixture with the left, which bounds the density ratio."""

from torch import Tensor

from student.losses.divergences.buckets import DivergenceSettings, kl, mixture


def skewed_kl(student_RJ: Tensor, teacher_RJ: Tensor, settings: DivergenceSettings) -> Tensor:
    """KL(p || s p + (1 - s) q), 0 < s < 1."""
    return kl(teacher_RJ, mixture(teacher_RJ, student_RJ, settings.skew))


def skewed_reverse_kl(student_RJ: Tensor, teacher_RJ: Tensor, settings: DivergenceSettings) -> Tensor:
    """KL(q || s q + (1 - s) p), 0 < s < 1."""
    return kl(student_RJ, mixture(student_RJ, teacher_RJ, settings.skew))
