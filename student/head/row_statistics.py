"""What the student itself thinks of each row, without a [T, V] tensor and without a gradient."""

import torch
from torch import Tensor

from student.data.targets import Targets
from student.head.chunk import project_
from student.head.chunked import HeadSpec


@torch.no_grad()
def row_statistics(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets: Targets, spec: HeadSpec, chunk_rows: int
) -> tuple[Tensor, Tensor]:
    """(entropy_T in nats, label_logprob_T) of the student at temperature 1, float32; 0 in rows of weight 0.

    Same chunks as `head_loss`, with two buffers of logits.
    """
    value_dtype = torch.promote_types(hidden_TD.dtype, torch.float32)
    weight_VD = weight_VD.to(hidden_TD.dtype)
    entropy_T, label_logprob_T = (hidden_TD.new_zeros(targets.rows, dtype=value_dtype) for _ in range(2))
    index_T = targets.weight_T.nonzero().squeeze(1)
    rows = spec.rows_per_chunk(chunk_rows, weight_VD.shape[0], entropy_T)
    for start in range(0, len(index_T), rows):
        index_R = index_T[start : start + rows]
        logits_RV = hidden_TD.new_empty((len(index_R), weight_VD.shape[0]), dtype=value_dtype)
        project_(hidden_TD[index_R], weight_VD, bias_V, spec.scale, spec.soft_cap, logits_RV)
        entropy_T[index_R], label_logprob_T[index_R] = _of_logits_(logits_RV, targets.label_T[index_R])
    return entropy_T, label_logprob_T


def _of_logits_(logits_RV: Tensor, label_R: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy log S - sum_v e_v z_v / S and label log-prob, with z shifted to a maximum of 0 and S = sum_v e_v."""
    logits_RV.sub_(logits_RV.amax(dim=1, keepdim=True))
    mass_RV = logits_RV.exp()
    sum_R = mass_RV.sum(dim=1)
    mean_R = torch.einsum("cv,cv->c", mass_RV, logits_RV) / sum_R
    label_R = logits_RV.gather(1, label_R[:, None]).squeeze(1)
    return sum_R.log() - mean_R, label_R - sum_R.log()
