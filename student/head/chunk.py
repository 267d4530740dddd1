"""One chunk of the student head: logits in, loss out, and the same buffer left holding the gradient of the logits.

A `LogitsKernel` reads the buffer once and overwrites it once: plain torch here, fused kernels in
`student.head.triton_kernel`. All other tensors are small, [R, J]. `student.head.chunked` has the formulas.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from student.losses.divergences.buckets import ABSENT

RowLoss = Callable[[Tensor, Tensor], Tensor]
"""(student_RJ, teacher_RJ) -> loss_R."""


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """What C rows of logits are compared against. Weights are those of the values; `*_pull` those of the gradient."""

    label_R: Tensor
    ce_weight_R: Tensor
    kd_weight_R: Tensor
    id_RK: Tensor
    """Padding repeats the row's first id, so that writing to all K ids writes to kept ids alone."""
    kept_RK: Tensor
    """bool: not padding."""
    teacher_RJ: Tensor
    """Log-probabilities at the temperature of training, ABSENT where there is none; the tail comes last."""
    ce_grad_scale: float
    kd_grad_scale: float

    @staticmethod
    def of(
        label_R: Tensor, ce_weight_R: Tensor, kd_weight_R: Tensor, id_RK: Tensor, logweight_RK: Tensor, tail_R: Tensor
    ) -> "ChunkRows":
        """Rows of stored targets, with pulls of 1."""
        kept_RK = logweight_RK > -torch.inf
        kept_RK[:, :1] = True
        teacher_RJ = torch.cat([logweight_RK, tail_R[:, None]], dim=1).clamp_min(ABSENT)
        id_RK = torch.where(kept_RK, id_RK, id_RK[:, :1])
        return ChunkRows(label_R, ce_weight_R, kd_weight_R, id_RK, kept_RK, teacher_RJ, 1.0, 1.0)

    def without_kd(self) -> "ChunkRows":
        """The same rows with the label alone."""
        return replace(self, id_RK=self.id_RK[:, :0], kept_RK=self.kept_RK[:, :0], teacher_RJ=self.teacher_RJ[:, -1:])


def project_(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    scale: float,
    soft_cap: float | None,
    logits_RV: Tensor,
) -> Tensor | None:
    """Logits into the buffer: scale * (hidden @ weight.T + bias), then the soft cap; its slope where there is one."""
    if hidden_RD.dtype == logits_RV.dtype:
        torch.mm(hidden_RD, weight_VD.t(), out=logits_RV)
    else:
        logits_RV.copy_(hidden_RD @ weight_VD.t())
    if bias_V is not None:
        logits_RV.add_(bias_V)
    if scale != 1.0:
        logits_RV.mul_(scale)
    if soft_cap is None:
        return None
    logits_RV.div_(soft_cap).tanh_()
    slope_RV = 1.0 - logits_RV.square()
    logits_RV.mul_(soft_cap)
    return slope_RV


class LogitsKernel(Protocol):
    """The two times that a chunk of logits z [R, V] is gone through: read, then overwritten. What a kernel has to be.

    p is a row's peak, at least as large as its every logit; sums leave out the kept ids.
    """

    peak_R: Tensor
    sumexp_R: Tensor
    """sum exp(z - p)."""
    sumexp_at_T_R: Tensor
    """sum exp((z - p) / T), T the temperature of training."""

    def write_(self, sumexp_R: Tensor, sumexp_at_T_R: Tensor) -> None:
        """Every z outside the kept ids becomes hard * exp(z - p) + soft * exp((z - p) / T), kept ones anything."""
        ...


class EagerLogitsKernel:
    """Plain torch: the buffer turns into exponentials in place; with T other than 1, a second buffer lies beside it."""

    def __init__(self, logits_RV: Tensor, id_RK: Tensor, temperature: float) -> None:
        self.peak_R = logits_RV.amax(dim=1)
        logits_RV.sub_(self.peak_R[:, None])
        self._scaled_RV = None
        if temperature != 1.0:
            self._scaled_RV = (logits_RV / temperature).exp_().scatter_(1, id_RK, 0.0)
        self._hard_RV = logits_RV.exp_().scatter_(1, id_RK, 0.0)
        self.sumexp_R = self._hard_RV.sum(dim=1)
        self.sumexp_at_T_R = self.sumexp_R if self._scaled_RV is None else self._scaled_RV.sum(dim=1)

    def write_(self, sumexp_R: Tensor, sumexp_at_T_R: Tensor) -> None:
        """See `Sweep`."""
        if self._scaled_RV is None:
            self._hard_RV.mul_((sumexp_R + sumexp_at_T_R)[:, None])
        else:
            self._hard_RV.mul_(sumexp_R[:, None]).addcmul_(self._scaled_RV, sumexp_at_T_R[:, None])


MakeLogitsKernel = Callable[[Tensor, Tensor, float], LogitsKernel]
"""(logits_RV, id_RK, temperature) -> the sweep over them, already read."""


def loss_and_dlogits_(
    logits_RV: Tensor,
    rows: ChunkRows,
    loss: RowLoss | None,
    temperature: float,
    gradient: bool,
    kernel: MakeLogitsKernel,
) -> tuple[Tensor, Tensor]:
    """Weighted sums (KD, CE) of the chunk; `logits_RV` becomes the gradient of kd_grad_scale * KD + ce_grad_scale * CE.

    `loss` None leaves KD out. Without `gradient` the buffer's contents are of no use afterwards.
    """
    if loss is None:
        rows, temperature = rows.without_kd(), 1.0
    kept_RK = logits_RV.gather(1, rows.id_RK)
    label_R = logits_RV.gather(1, rows.label_R[:, None]).squeeze(1)
    rest = kernel(logits_RV, rows.id_RK, temperature)
    kept_RK -= rest.peak_R[:, None]
    hard_RK, _, sumexp_R = _normalised(kept_RK, rest.sumexp_R, rows)
    ce = (rows.ce_weight_R * (sumexp_R.log() - (label_R - rest.peak_R))).sum()
    soft_RK, logrest_R, sumexp_at_T_R = _normalised(kept_RK / temperature, rest.sumexp_at_T_R, rows)
    kd, d_kept_RK, d_rest_R = _bucket_gradient(soft_RK, logrest_R, rows, loss, gradient)
    if gradient:
        ce_grad_scale_R = rows.ce_grad_scale * rows.ce_weight_R
        spread_R = -d_kept_RK.sum(dim=1) - d_rest_R
        d_soft_RK = (d_kept_RK + soft_RK.exp() * spread_R[:, None]) / temperature
        value_RK = d_soft_RK + hard_RK.exp() * ce_grad_scale_R[:, None]
        kd_grad_scale_R = (
            d_rest_R / rest.sumexp_at_T_R.clamp_min(_tiny(sumexp_at_T_R)) + spread_R / sumexp_at_T_R
        ) / temperature
        rest.write_(ce_grad_scale_R / sumexp_R, kd_grad_scale_R)
        logits_RV.scatter_(1, rows.id_RK, torch.where(rows.kept_RK, value_RK, value_RK[:, :1]))
        logits_RV.scatter_add_(1, rows.label_R[:, None], -ce_grad_scale_R[:, None])
    return kd, ce


def _normalised(kept_RK: Tensor, rest_R: Tensor, rows: ChunkRows) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the kept ids and of the rest, and the sum of all exponentials."""
    total_R = rest_R + (kept_RK.exp() * rows.kept_RK).sum(dim=1)
    logsum_R = total_R.log()
    return kept_RK - logsum_R[:, None], rest_R.clamp_min(_tiny(rest_R)).log() - logsum_R, total_R


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny


def _bucket_gradient(
    logprob_RK: Tensor, logrest_R: Tensor, rows: ChunkRows, loss: RowLoss | None, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum of `loss`, and its gradient by the kept log-probabilities and by that of the rest."""
    if loss is None:
        return logrest_R.new_zeros(()), torch.zeros_like(logprob_RK), torch.zeros_like(logrest_R)
    student_RJ = torch.cat([logprob_RK.masked_fill(~rows.kept_RK, ABSENT), logrest_R[:, None]], dim=1)
    with torch.set_grad_enabled(gradient):
        kd = (rows.kd_weight_R * loss(student_RJ.requires_grad_(gradient), rows.teacher_RJ)).sum()
        d_student_RJ = torch.autograd.grad(rows.kd_grad_scale * kd, student_RJ)[0] if gradient else student_RJ
    return kd.detach(), d_student_RJ[:, :-1], d_student_RJ[:, -1]
