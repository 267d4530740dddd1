"""What the student itself thinks of each row, without a [T, V] tensor and without a gradient."""

import torch
from torch import Tensor

from student.head import HeadSpec
from student.head_chunk import project_
from student.targets import Targets


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
        index_C = index_T[start : start + rows]
        logits_CV = hidden_TD.new_empty((len(index_C), weight_VD.shape[0]), dtype=value_dtype)
        project_(hidden_TD[index_C], weight_VD, bias_V, spec.scale, spec.soft_cap, logits_CV)
        entropy_T[index_C], label_logprob_T[index_C] = _of_logits_(logits_CV, targets.label_T[index_C])
    return entropy_T, label_logprob_T


def _of_logits_(logits_CV: Tensor, label_C: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy log S - sum_v e_v z_v / S and label log-prob, with z shifted to a maximum of 0 and S = sum_v e_v."""
    logits_CV.sub_(logits_CV.amax(dim=1, keepdim=True))
    mass_CV = logits_CV.exp()
    sum_C = mass_CV.sum(dim=1)
    mean_C = torch.einsum("cv,cv->c", mass_CV, logits_CV) / sum_C
    label_C = logits_CV.gather(1, label_C[:, None]).squeeze(1)
    return sum_C.log() - mean_C, label_C - sum_C.log()
