"""Forward KL of the student to the teacher's full distribution, computed chunk by chunk from stored hidden states.

Exact at any temperature, unlike the loss against kept entries: the reference that cheaper targets are measured against.
Needs the input of the teacher's LM head for every row (hidden layer -1) and the LM head itself; costs one more matrix
product and a few more [R, V] buffers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from student.data.targets import Targets
from student.head.chunk import write_logits_
from student.head.chunked import ChunkLoss, HeadLoss, HeadSpec, fused_linear_loss, kd_coefficient


@dataclass(frozen=True, slots=True)
class TeacherHead:
    """The teacher's LM head on the student's device; see `pipeline.contracts.LmHead`."""

    weight_VE: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None


def exact_head_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    teacher_hidden_TE: Tensor,
    teacher_head: TeacherHead,
    targets: Targets,
    spec: HeadSpec,
    chunk_rows: int,
) -> HeadLoss:
    """Like `head_loss`, with forward KL over the full vocabulary; entries and mode of `targets` are not read.

    Raises ValueError where the vocabularies differ: cut the wider head to the tokenizer's ids first.
    """
    if teacher_head.weight_VE.shape[0] != weight_VD.shape[0]:
        raise ValueError(
            f"exact_head_loss: expected one vocabulary, got {teacher_head.weight_VE.shape[0]} for the teacher and "
            f"{weight_VD.shape[0]} for the student"
        )
    loss = _FullVocabularyLoss(targets, spec, teacher_hidden_TE, teacher_head)
    return fused_linear_loss(hidden_TD, weight_VD, bias_V, loss, chunk_rows)


@dataclass(frozen=True, slots=True)
class _FullVocabularyLoss(ChunkLoss):
    """Forward KL over the full vocabulary, and cross-entropy with the label."""

    teacher_hidden_TE: Tensor
    head: TeacherHead

    def loss_and_dlogits_(self, logits_RV: Tensor, index_R: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        rows, temperature = self.targets.rows_at(index_R), self.spec.distribution.temperature
        teacher_RV = torch.log_softmax(self._teacher_logits(logits_RV, index_R).div_(temperature), dim=1)
        scaled_logprob_RV = torch.log_softmax(logits_RV / temperature, dim=1)
        logprob_RV = scaled_logprob_RV if temperature == 1.0 else torch.log_softmax(logits_RV, dim=1)
        kd_R = torch.nn.functional.kl_div(scaled_logprob_RV, teacher_RV, reduction="none", log_target=True).sum(dim=1)
        label_R1 = rows.label_T[:, None]
        ce = -(rows.weight_T * logprob_RV.gather(1, label_R1).squeeze(1)).sum()
        kd = (rows.output_weight * kd_R).sum()
        if gradient:
            kd_grad_R1 = (kd_coefficient(self.spec) / temperature * rows.output_weight)[:, None].to(logits_RV.dtype)
            ce_grad_R1 = (self.spec.ce * rows.weight_T)[:, None].to(logits_RV.dtype)
            torch.mul(scaled_logprob_RV.exp().sub_(teacher_RV.exp_()), kd_grad_R1, out=logits_RV)
            logits_RV.addcmul_(logprob_RV.exp(), ce_grad_R1)
            logits_RV.scatter_add_(1, label_R1, -ce_grad_R1)
        return kd, ce

    def _teacher_logits(self, like_RV: Tensor, index_R: Tensor) -> Tensor:
        logits_RV, head = torch.empty_like(like_RV), self.head
        hidden_RE = self.teacher_hidden_TE[index_R].to(head.weight_VE.dtype)
        write_logits_(hidden_RE, head.weight_VE, head.bias_V, head.scale, head.soft_cap, logits_RV)
        return logits_RV
