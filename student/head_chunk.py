"""One chunk of the student head: logits in, loss out, and the same buffer left holding the gradient of the logits.

Plain torch, for every device, and the place where a fused kernel would take over: it has to honour `fold_` alone.
The formulas are in `student.head`. C rows, V vocabulary, K kept ids, B = K + 1 buckets.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from student.losses.buckets import ABSENT

RowLoss = Callable[[Tensor, Tensor], Tensor]
"""(student_CB, teacher_CB) -> loss_C."""


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """What C rows of logits are compared against. Weights are those of the values; `*_pull` those of the gradient."""

    label_C: Tensor
    ce_weight_C: Tensor
    kd_weight_C: Tensor
    id_CK: Tensor
    """Padding repeats the row's first id, so that writing to all K ids writes to kept ids alone."""
    kept_CK: Tensor
    """bool: not padding."""
    teacher_CB: Tensor
    """Log-probabilities at the temperature of training, ABSENT where there is none; the tail comes last."""
    ce_pull: float
    kd_pull: float

    @staticmethod
    def of(
        label_C: Tensor, ce_weight_C: Tensor, kd_weight_C: Tensor, id_CK: Tensor, logweight_CK: Tensor, tail_C: Tensor
    ) -> "ChunkRows":
        """Rows of stored targets, with pulls of 1."""
        kept_CK = logweight_CK > -torch.inf
        kept_CK[:, :1] = True
        teacher_CB = torch.cat([logweight_CK, tail_C[:, None]], dim=1).clamp_min(ABSENT)
        id_CK = torch.where(kept_CK, id_CK, id_CK[:, :1])
        return ChunkRows(label_C, ce_weight_C, kd_weight_C, id_CK, kept_CK, teacher_CB, 1.0, 1.0)

    def without_kd(self) -> "ChunkRows":
        """The same rows with the label alone."""
        return replace(self, id_CK=self.id_CK[:, :0], kept_CK=self.kept_CK[:, :0], teacher_CB=self.teacher_CB[:, -1:])


def project_(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    scale: float,
    soft_cap: float | None,
    logits_CV: Tensor,
) -> Tensor | None:
    """Logits into the buffer: scale * (hidden @ weight.T + bias), then the soft cap; its slope where there is one."""
    if hidden_CD.dtype == logits_CV.dtype:
        torch.mm(hidden_CD, weight_VD.t(), out=logits_CV)
    else:
        logits_CV.copy_(hidden_CD @ weight_VD.t())
    if bias_V is not None:
        logits_CV.add_(bias_V)
    if scale != 1.0:
        logits_CV.mul_(scale)
    if soft_cap is None:
        return None
    logits_CV.div_(soft_cap).tanh_()
    slope_CV = 1.0 - logits_CV.square()
    logits_CV.mul_(soft_cap)
    return slope_CV


def fold_(
    logits_CV: Tensor, rows: ChunkRows, loss: RowLoss | None, temperature: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Weighted sums (KD, CE) of the chunk; `logits_CV` becomes the gradient of kd_pull * KD + ce_pull * CE.

    `loss` None leaves KD out. Without `gradient` the buffer's contents are of no use afterwards.
    """
    zero = logits_CV.new_zeros(())
    if loss is None:
        return zero, _fold_one_(logits_CV, rows.without_kd(), None, gradient)[1]
    if temperature == 1.0:
        return _fold_one_(logits_CV, rows, loss, gradient)
    softer_CV = logits_CV / temperature
    kd = _fold_one_(softer_CV, replace(rows, ce_pull=0.0), loss, gradient)[0]
    ce = _fold_one_(logits_CV, rows.without_kd(), None, gradient)[1]
    if gradient:
        logits_CV.add_(softer_CV, alpha=1.0 / temperature)
    return kd, ce


def _fold_one_(logits_CV: Tensor, rows: ChunkRows, loss: RowLoss | None, gradient: bool) -> tuple[Tensor, Tensor]:
    """`fold_` at temperature 1."""
    peak_C1 = logits_CV.amax(dim=1, keepdim=True)
    kept_CK = logits_CV.gather(1, rows.id_CK).sub_(peak_C1)
    label_C = logits_CV.gather(1, rows.label_C[:, None]).sub_(peak_C1).squeeze(1)
    rest_C = logits_CV.sub_(peak_C1).exp_().scatter_(1, rows.id_CK, 0.0).sum(dim=1)
    total_C = rest_C + (kept_CK.exp() * rows.kept_CK).sum(dim=1)
    logsum_C = total_C.log()
    ce = (rows.ce_weight_C * (logsum_C - label_C)).sum()
    kept_CK -= logsum_C[:, None]
    tiny = torch.finfo(rest_C.dtype).tiny
    logrest_C = rest_C.clamp_min(tiny).log() - logsum_C
    kd, d_kept_CK, d_rest_C = _bucket_gradient(kept_CK, logrest_C, rows, loss, gradient)
    if gradient:
        ce_pull_C = rows.ce_pull * rows.ce_weight_C
        spread_C = ce_pull_C - d_kept_CK.sum(dim=1) - d_rest_C
        value_CK = d_kept_CK + kept_CK.exp() * spread_C[:, None]
        value_CK = torch.where(rows.kept_CK, value_CK, value_CK[:, :1])
        logits_CV.mul_((d_rest_C / rest_C.clamp_min(tiny) + spread_C / total_C)[:, None])
        logits_CV.scatter_(1, rows.id_CK, value_CK)
        logits_CV.scatter_add_(1, rows.label_C[:, None], -ce_pull_C[:, None])
    return kd, ce


def _bucket_gradient(
    logprob_CK: Tensor, logrest_C: Tensor, rows: ChunkRows, loss: RowLoss | None, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum of `loss`, and its gradient by the kept log-probabilities and by that of the rest."""
    if loss is None:
        return logrest_C.new_zeros(()), torch.zeros_like(logprob_CK), torch.zeros_like(logrest_C)
    student_CB = torch.cat([logprob_CK.masked_fill(~rows.kept_CK, ABSENT), logrest_C[:, None]], dim=1)
    with torch.set_grad_enabled(gradient):
        kd = (rows.kd_weight_C * loss(student_CB.requires_grad_(gradient), rows.teacher_CB)).sum()
        d_student_CB = torch.autograd.grad(rows.kd_pull * kd, student_CB)[0] if gradient else student_CB
    return kd.detach(), d_student_CB[:, :-1], d_student_CB[:, -1]
