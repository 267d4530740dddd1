"""Forward KL(p || q): the default, and the only one that sampled targets support.

Over buckets: L = sum_K p log(p/q) + (1 - a) log((1 - a)/(1 - Q)), the "ghost" form: head exact, tail as one block. It
is a lower bound of the full KL. With targets whose weights sum to 1 (`unbiased`, `sampled`) it is the plain
cross-entropy L = -sum_K w log q, whose gradient is that of the full KL on average.
"""

from torch import Tensor

from student.losses.divergences.buckets import DivergenceSettings, kl


def forward_kl(student_RJ: Tensor, teacher_RJ: Tensor, settings: DivergenceSettings) -> Tensor:
    """KL(p || q) over K + 1 buckets."""
    return kl(teacher_RJ, student_RJ)


def weighted_cross_entropy(student_RJ: Tensor, teacher_RJ: Tensor, settings: DivergenceSettings) -> Tensor:
    """-sum_b w_b log q_b: on average the cross-entropy H(p, q), so the teacher's entropy above the KL."""
    return -(teacher_RJ.exp() * student_RJ).sum(dim=1)
