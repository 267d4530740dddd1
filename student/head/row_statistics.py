"""Entropy and label log-probability of the student's own distribution, without a [T, V] tensor."""

import torch
from torch import Tensor

from student.data.targets import Targets
from student.head.chunk import write_logits_
from student.head.chunked import HeadSpec


@torch.no_grad()
def row_statistics(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets: Targets, spec: HeadSpec, chunk_rows: int
) -> tuple[Tensor, Tensor]:
    """(entropy_T in nats, label_logprob_T) at temperature 1, float32, without gradient; 0 in rows of weight 0.

    Uses the chunks of `head_loss` and two [R, V] buffers.
    """
    value_dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    weight_VD = weight_VD.to(hidden_TD.dtype)
    entropy_T, label_logprob_T = (hidden_TD.new_zeros(targets.rows, dtype=value_dtype) for _ in range(2))
    index_T = targets.weight_T.nonzero().squeeze(1)
    rows = spec.rows_per_chunk(chunk_rows, weight_VD.shape[0], entropy_T)
    for start in range(0, len(index_T), rows):
        index_R = index_T[start : start + rows]
        logits_RV = hidden_TD.new_empty((len(index_R), weight_VD.shape[0]), dtype=value_dtype)
        write_logits_(hidden_TD[index_R], weight_VD, bias_V, spec.scale, spec.soft_cap, logits_RV)
        entropy_T[index_R], label_logprob_T[index_R] = _entropy_and_label_logprob_(logits_RV, targets.label_T[index_R])
    return entropy_T, label_logprob_T


def _entropy_and_label_logprob_(logits_RV: Tensor, label_R: Tensor) -> tuple[Tensor, Tensor]:
    """With z shifted to a maximum of 0 and S = sum_v exp(z_v): log S - sum_v exp(z_v) z_v / S, and z_label - log S."""
    logits_RV.sub_(logits_RV.amax(dim=1, keepdim=True))
    exp_RV = logits_RV.exp()
    sumexp_R = exp_RV.sum(dim=1)
    mean_logit_R = torch.einsum("rv,rv->r", exp_RV, logits_RV) / sumexp_R
    label_logit_R = logits_RV.gather(1, label_R[:, None]).squeeze(1)
    return sumexp_R.log() - mean_logit_R, label_logit_R - sumexp_R.log()
