"""Generalised Jensen-Shannon divergence (Agarwal et al. 2024, GKD); bounded by the entropy of (b, 1 - b)."""

from torch import Tensor

from student.losses.divergences.buckets import DivergenceSettings, kl, mixture


def jensen_shannon(student_RJ: Tensor, teacher_RJ: Tensor, settings: DivergenceSettings) -> Tensor:
    """b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, 0 < b < 1.

    As published, without rescaling: divided by b it tends to `forward_kl` for b -> 0, and divided by 1 - b to
    `reverse_kl` for b -> 1; at the ends themselves it is 0, so `check_supported` refuses them.
    """
    mixture_RJ = mixture(teacher_RJ, student_RJ, settings.beta)
    return settings.beta * kl(teacher_RJ, mixture_RJ) + (1.0 - settings.beta) * kl(student_RJ, mixture_RJ)
