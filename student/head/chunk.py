"""Loss of one chunk of logits, computed in place: the buffer of the logits ends up holding their gradient.

A `LogitsKernel` reads the buffer once and overwrites it once: in plain torch here, fused in
`student.head.triton_kernel`. All other tensors are small, [R, J]. `student.head.chunked` has the formulas.

Names: `tail` is the vocabulary outside a row's kept ids; a name with `scaled` belongs to the temperature-scaled logits
z / T, one without it to z.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from student.data.targets import Targets
from student.losses.divergences.buckets import ABSENT

RowLoss = Callable[[Tensor, Tensor], Tensor]
"""(student_RJ, teacher_RJ) -> loss_R."""


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """Labels, targets and weights of the R rows of a chunk. A weight multiplies a row's loss in the sums."""

    label_R: Tensor
    ce_weight_R: Tensor
    kd_weight_R: Tensor
    id_RK: Tensor
    """Kept ids. Padding repeats the row's first id, so that writing to all K ids writes to kept ids only."""
    kept_RK: Tensor
    """bool: not padding."""
    teacher_RJ: Tensor
    """Log-probabilities at the training temperature, the tail's last; ABSENT in padding and in an empty tail."""
    ce_grad_scale: float
    """Coefficient of CE in the loss that the gradient is of."""
    kd_grad_scale: float

    @staticmethod
    def of(targets: Targets, ce_grad_scale: float, kd_grad_scale: float, dtype: torch.dtype) -> "ChunkRows":
        """Rows of stored targets, with weights and log-probabilities in `dtype`."""
        ids_RK, logweight_RK = targets.entry_id_TK, targets.entry_logweight_TK
        kept_RK = logweight_RK > -torch.inf
        kept_RK[:, :1] = True
        teacher_RJ = torch.cat([logweight_RK, targets.tail_logmass_T[:, None]], dim=1).to(dtype).clamp_min(ABSENT)
        id_RK = torch.where(kept_RK, ids_RK, ids_RK[:, :1])
        ce_weight_R, kd_weight_R = targets.weight_T.to(dtype), targets.output_weight.to(dtype)
        scales = ce_grad_scale, kd_grad_scale
        return ChunkRows(targets.label_T, ce_weight_R, kd_weight_R, id_RK, kept_RK, teacher_RJ, *scales)

    def without_kd(self) -> "ChunkRows":
        """Copy without kept ids: labels only."""
        return replace(self, id_RK=self.id_RK[:, :0], kept_RK=self.kept_RK[:, :0], teacher_RJ=self.teacher_RJ[:, -1:])


def write_logits_(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    scale: float,
    soft_cap: float | None,
    logits_RV: Tensor,
) -> Tensor | None:
    """Write scale * (hidden @ weight.T + bias), soft-capped, to `logits_RV`; return the cap's derivative."""
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
    derivative_RV = 1.0 - logits_RV.square()
    logits_RV.mul_(soft_cap)
    return derivative_RV


class LogitsKernel(Protocol):
    """The two passes over a chunk of logits z [R, V]: the constructor reads z, `write_` overwrites it.

    m is a row's maximum over all its logits; sums are over the tail.
    """

    max_R: Tensor
    tail_sumexp_R: Tensor
    """sum exp(z - m)."""
    scaled_tail_sumexp_R: Tensor
    """sum exp((z - m) / T), T the training temperature."""

    def write_(self, factor_R: Tensor, scaled_factor_R: Tensor) -> None:
        """In the tail, z = factor * exp(z - m) + scaled_factor * exp((z - m) / T); kept ids are undefined after it."""


class EagerLogitsKernel:
    """Plain torch: exponentials overwrite the logits; a temperature other than 1 takes a second [R, V] buffer."""

    def __init__(self, logits_RV: Tensor, id_RK: Tensor, temperature: float) -> None:
        self.max_R = logits_RV.amax(dim=1)
        logits_RV.sub_(self.max_R[:, None])
        scaled_RV = None if temperature == 1.0 else logits_RV / temperature
        self._exp_RV = logits_RV.exp_().scatter_(1, id_RK, 0.0)
        self._scaled_exp_RV = None if scaled_RV is None else scaled_RV.exp_().scatter_(1, id_RK, 0.0)
        self.tail_sumexp_R = self._exp_RV.sum(dim=1)
        self.scaled_tail_sumexp_R = self.tail_sumexp_R if scaled_RV is None else scaled_RV.sum(dim=1)

    def write_(self, factor_R: Tensor, scaled_factor_R: Tensor) -> None:
        """See `LogitsKernel`."""
        if self._scaled_exp_RV is None:
            self._exp_RV.mul_((factor_R + scaled_factor_R)[:, None])
        else:
            self._exp_RV.mul_(factor_R[:, None]).addcmul_(self._scaled_exp_RV, scaled_factor_R[:, None])


MakeLogitsKernel = Callable[[Tensor, Tensor, float], LogitsKernel]
"""(logits_RV, id_RK, temperature) -> LogitsKernel."""


def loss_and_dlogits_(
    logits_RV: Tensor,
    rows: ChunkRows,
    loss: RowLoss | None,
    temperature: float,
    gradient: bool,
    make_kernel: MakeLogitsKernel,
) -> tuple[Tensor, Tensor]:
    """Weighted sums (KD, CE) of the chunk; `logits_RV` becomes the gradient of kd_grad_scale * KD + ce_grad_scale * CE.

    `loss` None leaves KD out. Without `gradient` the buffer's contents are undefined afterwards.
    """
    if loss is None:
        rows, temperature = rows.without_kd(), 1.0
    logit_RK = logits_RV.gather(1, rows.id_RK)
    label_logit_R = logits_RV.gather(1, rows.label_R[:, None]).squeeze(1)
    kernel = make_kernel(logits_RV, rows.id_RK, temperature)
    logit_RK -= kernel.max_R[:, None]
    logprob_RK, _, sumexp_R = _log_softmax(logit_RK, kernel.tail_sumexp_R, rows)
    ce = (rows.ce_weight_R * (sumexp_R.log() - (label_logit_R - kernel.max_R))).sum()
    scaled_logprob_RK, scaled_tail_logprob_R, scaled_sumexp_R = _log_softmax(
        logit_RK / temperature, kernel.scaled_tail_sumexp_R, rows
    )
    kd, d_kept_RK, d_tail_R = _kd_and_gradient(scaled_logprob_RK, scaled_tail_logprob_R, rows, loss, gradient)
    if gradient:
        ce_grad_R = rows.ce_grad_scale * rows.ce_weight_R
        grad_sum_R = d_kept_RK.sum(dim=1) + d_tail_R
        d_scaled_RK = (d_kept_RK - scaled_logprob_RK.exp() * grad_sum_R[:, None]) / temperature
        d_logit_RK = d_scaled_RK + logprob_RK.exp() * ce_grad_R[:, None]
        tail_sumexp_R = kernel.scaled_tail_sumexp_R.clamp_min(torch.finfo(logits_RV.dtype).tiny)
        kernel.write_(ce_grad_R / sumexp_R, (d_tail_R / tail_sumexp_R - grad_sum_R / scaled_sumexp_R) / temperature)
        logits_RV.scatter_(1, rows.id_RK, torch.where(rows.kept_RK, d_logit_RK, d_logit_RK[:, :1]))
        logits_RV.scatter_add_(1, rows.label_R[:, None], -ce_grad_R[:, None])
    return kd, ce


def _log_softmax(logit_RK: Tensor, tail_sumexp_R: Tensor, rows: ChunkRows) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the kept ids, that of the tail, and the softmax denominator."""
    sumexp_R = tail_sumexp_R + (logit_RK.exp() * rows.kept_RK).sum(dim=1)
    logsumexp_R = sumexp_R.log()
    tail_logprob_R = tail_sumexp_R.clamp_min(torch.finfo(sumexp_R.dtype).tiny).log() - logsumexp_R
    return logit_RK - logsumexp_R[:, None], tail_logprob_R, sumexp_R


def _kd_and_gradient(
    logprob_RK: Tensor, tail_logprob_R: Tensor, rows: ChunkRows, loss: RowLoss | None, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum of `loss`, and its gradient by the log-probabilities of the kept ids and of the tail."""
    if loss is None:
        return tail_logprob_R.new_zeros(()), torch.zeros_like(logprob_RK), torch.zeros_like(tail_logprob_R)
    student_RJ = torch.cat([logprob_RK.masked_fill(~rows.kept_RK, ABSENT), tail_logprob_R[:, None]], dim=1)
    with torch.set_grad_enabled(gradient):
        kd = (rows.kd_weight_R * loss(student_RJ.requires_grad_(gradient), rows.teacher_RJ)).sum()
        d_student_RJ = torch.autograd.grad(rows.kd_grad_scale * kd, student_RJ)[0] if gradient else student_RJ
    return kd.detach(), d_student_RJ[:, :-1], d_student_RJ[:, -1]
