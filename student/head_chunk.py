"""One chunk of the student head: logits in, loss out, and the same buffer left holding the gradient of the logits.

The buffer is gone through twice, by a `Sweep`: plain torch here, fused kernels in `student.head_triton`. All between
is small, [C, B], and the same for both. The formulas are in `student.head`. C rows, V vocabulary, K kept ids, B = K + 1
buckets.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

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


class Sweep(Protocol):
    """The two times that a chunk of logits z [C, V] is gone through: read, then overwritten. What a kernel has to be.

    p is a row's peak, at least as large as its every logit; sums leave out the kept ids.
    """

    peak_C: Tensor
    hard_C: Tensor
    """sum exp(z - p)."""
    soft_C: Tensor
    """sum exp((z - p) / T), T the temperature of training."""

    def write_(self, hard_C: Tensor, soft_C: Tensor) -> None:
        """Every z outside the kept ids becomes hard * exp(z - p) + soft * exp((z - p) / T), kept ones anything."""
        ...


class EagerSweep:
    """Plain torch: the buffer turns into exponentials in place; with T other than 1, a second buffer lies beside it."""

    def __init__(self, logits_CV: Tensor, id_CK: Tensor, temperature: float) -> None:
        self.peak_C = logits_CV.amax(dim=1)
        logits_CV.sub_(self.peak_C[:, None])
        self._soft_CV = None
        if temperature != 1.0:
            self._soft_CV = (logits_CV / temperature).exp_().scatter_(1, id_CK, 0.0)
        self._hard_CV = logits_CV.exp_().scatter_(1, id_CK, 0.0)
        self.hard_C = self._hard_CV.sum(dim=1)
        self.soft_C = self.hard_C if self._soft_CV is None else self._soft_CV.sum(dim=1)

    def write_(self, hard_C: Tensor, soft_C: Tensor) -> None:
        """See `Sweep`."""
        if self._soft_CV is None:
            self._hard_CV.mul_((hard_C + soft_C)[:, None])
        else:
            self._hard_CV.mul_(hard_C[:, None]).addcmul_(self._soft_CV, soft_C[:, None])


MakeSweep = Callable[[Tensor, Tensor, float], Sweep]
"""(logits_CV, id_CK, temperature) -> the sweep over them, already read."""


def fold_(
    logits_CV: Tensor, rows: ChunkRows, loss: RowLoss | None, temperature: float, gradient: bool, sweep: MakeSweep
) -> tuple[Tensor, Tensor]:
    """Weighted sums (KD, CE) of the chunk; `logits_CV` becomes the gradient of kd_pull * KD + ce_pull * CE.

    `loss` None leaves KD out. Without `gradient` the buffer's contents are of no use afterwards.
    """
    if loss is None:
        rows, temperature = rows.without_kd(), 1.0
    kept_CK = logits_CV.gather(1, rows.id_CK)
    label_C = logits_CV.gather(1, rows.label_C[:, None]).squeeze(1)
    rest = sweep(logits_CV, rows.id_CK, temperature)
    kept_CK -= rest.peak_C[:, None]
    hard_CK, _, hard_C = _normalised(kept_CK, rest.hard_C, rows)
    ce = (rows.ce_weight_C * (hard_C.log() - (label_C - rest.peak_C))).sum()
    soft_CK, logrest_C, soft_C = _normalised(kept_CK / temperature, rest.soft_C, rows)
    kd, d_kept_CK, d_rest_C = _bucket_gradient(soft_CK, logrest_C, rows, loss, gradient)
    if gradient:
        ce_pull_C = rows.ce_pull * rows.ce_weight_C
        spread_C = -d_kept_CK.sum(dim=1) - d_rest_C
        d_soft_CK = (d_kept_CK + soft_CK.exp() * spread_C[:, None]) / temperature
        value_CK = d_soft_CK + hard_CK.exp() * ce_pull_C[:, None]
        soft_pull_C = (d_rest_C / rest.soft_C.clamp_min(_tiny(soft_C)) + spread_C / soft_C) / temperature
        rest.write_(ce_pull_C / hard_C, soft_pull_C)
        logits_CV.scatter_(1, rows.id_CK, torch.where(rows.kept_CK, value_CK, value_CK[:, :1]))
        logits_CV.scatter_add_(1, rows.label_C[:, None], -ce_pull_C[:, None])
    return kd, ce


def _normalised(kept_CK: Tensor, rest_C: Tensor, rows: ChunkRows) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the kept ids and of the rest, and the sum of all exponentials."""
    total_C = rest_C + (kept_CK.exp() * rows.kept_CK).sum(dim=1)
    logsum_C = total_C.log()
    return kept_CK - logsum_C[:, None], rest_C.clamp_min(_tiny(rest_C)).log() - logsum_C, total_C


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny


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
