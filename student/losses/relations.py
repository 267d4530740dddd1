"""Relation losses: compare the similarity of two positions' states in the student with that in the teacher.

No projection, so the widths may differ. `similarity_kl` is the self-relation loss of MiniLMv2 (Wang et al. 2021) on
hidden states. Positions are compared within windows of W rows of one sequence, counted from its start, and states are
normalized per row (the teacher's channels first by their root mean square), so the loss of a sequence does not depend
on how a micro-batch is packed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.config.training import RelationSpec
from pipeline.errors import RecipeError

PADDING = -1
"""Index of a window's rows behind the end of its sequence."""


def relation_loss(
    student_TD: Tensor,
    teacher_TE: Tensor,
    rms_E: Tensor,
    weight_T: Tensor,
    sequence_rows: Sequence[int],
    spec: RelationSpec,
) -> Tensor:
    """Sum over rows of weight * the row's relation loss.

    `sequence_rows` holds the number of rows of each packed sequence, in order; further rows are padding.
    `similarity_kl`: mean over H heads of KL(R_teacher || R_student), R = causal softmax(X X^T / sqrt(Q)) within the
    window, X [W, Q] the states of one head with unit root mean square per row. `gram`: mean over the window's rows of
    the squared difference of the cosines. Raises RecipeError if the heads do not divide both widths.
    """
    index_GW = window_index(sequence_rows, spec.window).to(student_TD.device)
    value_dtype = torch.promote_types(student_TD.dtype, torch.float32)
    student_TD = student_TD.to(value_dtype)
    teacher_TE = teacher_TE.detach().to(value_dtype) / rms_E.to(value_dtype)
    row_loss = _similarity_kl if spec.loss == "similarity_kl" else _gram
    heads = spec.heads if spec.loss == "similarity_kl" else 1
    student_GHWQ, teacher_GHWQ = (_unit_rows(x, index_GW, heads) for x in (student_TD, teacher_TE))
    valid_GW = index_GW != PADDING
    weight_GW = torch.where(valid_GW, weight_T[index_GW.clamp_min(0)], 0.0)
    loss_GW = row_loss(student_GHWQ, teacher_GHWQ, valid_GW)
    return torch.where(weight_GW != 0, weight_GW * loss_GW, 0.0).sum()


def window_index(sequence_rows: Sequence[int], window: int) -> Tensor:
    """Return the row numbers of each window, int64 [G, W], PADDING behind a sequence's end."""
    windows, start = [], 0
    for rows in sequence_rows:
        count = -(-rows // window)
        row_GW = torch.arange(count * window).reshape(count, window)
        windows.append(torch.where(row_GW < rows, row_GW + start, PADDING))
        start += rows
    return torch.cat(windows) if windows else torch.empty((0, window), dtype=torch.int64)


def _unit_rows(state_TD: Tensor, index_GW: Tensor, heads: int) -> Tensor:
    """States by window, [G, H, W, Q] with Q = D / H, each head of each row of unit length; padding is 0."""
    width = state_TD.shape[1]
    if width % heads:
        raise RecipeError(f"training.relation.heads: expected a divisor of the hidden width {width}, got {heads}")
    window_GWHQ = state_TD[index_GW.clamp_min(0)].reshape(*index_GW.shape, heads, width // heads)
    window_GWHQ = window_GWHQ.masked_fill((index_GW == PADDING)[:, :, None, None], 0.0)
    return torch.nn.functional.normalize(window_GWHQ, dim=3).transpose(1, 2)


def _similarity_kl(student_GHWQ: Tensor, teacher_GHWQ: Tensor, valid_GW: Tensor) -> Tensor:
    """KL per row, mean over heads. Row t is compared with rows 0..t of its window, of which none is padding."""
    student_GHWW, teacher_GHWW = _log_relation(student_GHWQ), _log_relation(teacher_GHWQ)
    kl_GHW = torch.nn.functional.kl_div(student_GHWW, teacher_GHWW, reduction="none", log_target=True).sum(dim=3)
    return kl_GHW.mean(dim=1)


def _log_relation(unit_GHWQ: Tensor) -> Tensor:
    """Causal log softmax of sqrt(Q) * cosine, which is x_i . x_j / sqrt(Q) for states x of unit root mean square."""
    window, width = unit_GHWQ.shape[2:]
    score_GHWW = (unit_GHWQ @ unit_GHWQ.transpose(2, 3)) * width**0.5
    later_WW = torch.ones(window, window, dtype=torch.bool, device=unit_GHWQ.device).triu(1)
    # Finite, so that a masked pair gives 0 * (x - x) = 0 and not nan; its probability is exactly 0.
    return torch.log_softmax(score_GHWW.masked_fill(later_WW, -1.0e4), dim=3)


def _gram(student_GHWQ: Tensor, teacher_GHWQ: Tensor, valid_GW: Tensor) -> Tensor:
    """Per row, the mean over the window's rows of (cosine_teacher - cosine_student)^2."""
    difference_GWW = (_cosines(teacher_GHWQ) - _cosines(student_GHWQ)).square().squeeze(1)
    return difference_GWW.sum(dim=2) / valid_GW.sum(dim=1, keepdim=True)


def _cosines(unit_GHWQ: Tensor) -> Tensor:
    return unit_GHWQ @ unit_GHWQ.transpose(2, 3)
