"""Forward KL(p || q): the default, and the only divergence that sampled targets support.

With a and b the mass that teacher p and student q give to the kept entries,
L = sum_k p_k log(p_k / q_k) + (1 - a) log((1 - a) / (1 - b)): exact for the entries, one bucket for the tail. It is a
lower bound of the full KL (log-sum inequality). For targets whose weights w sum to 1 (`unbiased`, `sampled`) it is the
cross-entropy L = -sum_k w_k log q_k, whose gradient is an unbiased estimate of the gradient of the full KL.
"""

from torch import Tensor

from student.losses.divergences.buckets import DivergenceSettings, kl


def forward_kl(student_RJ: Tensor, teacher_RJ: Tensor, settings: DivergenceSettings) -> Tensor:
    """KL(p || q) over J buckets."""
    return kl(teacher_RJ, student_RJ)


def weighted_cross_entropy(student_RJ: Tensor, teacher_RJ: Tensor, settings: DivergenceSettings) -> Tensor:
    """-sum_j w_j log q_j: its expectation is the cross-entropy H(p, q) = KL(p || q) + H(p)."""
    return -(teacher_RJ.exp() * student_RJ).sum(dim=1)
