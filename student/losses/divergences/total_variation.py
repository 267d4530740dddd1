"""Total variation distance, in [0, 1]. Over buckets it is a lower bound of the full distance."""

from torch import Tensor

from student.losses.divergences.buckets import DivergenceSettings


def total_variation(student_RJ: Tensor, teacher_RJ: Tensor, settings: DivergenceSettings) -> Tensor:
    """1/2 sum_j |p_j - q_j|."""
    return 0.5 * (teacher_RJ.exp() - student_RJ.exp()).abs().sum(dim=1)
