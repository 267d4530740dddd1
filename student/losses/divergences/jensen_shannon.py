"""Generalised Jensen-Shannon divergence: bounded, the safest of the mode-seeking losses (Agarwal et al. 2024, GKD)."""

from torch import Tensor

from student.losses.divergences.buckets import DivergenceSettings, kl, mixture


def jensen_shannon(student_RJ: Tensor, teacher_RJ: Tensor, settings: DivergenceSettings) -> Tensor:
    """b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, 0 < b < 1.

    As published, without rescaling: it shrinks like b towards 0 and like 1 - b towards 1, so the ends are refused
    (`forward_kl` and `reverse_kl` are what it tends to, divided by that factor).
    """
    middle_RJ = mixture(teacher_RJ, student_RJ, settings.beta)
    return settings.beta * kl(teacher_RJ, middle_RJ) + (1.0 - settings.beta) * kl(student_RJ, middle_RJ)
