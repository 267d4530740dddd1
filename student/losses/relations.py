"""Losses between relations: how alike the states of two positions are, in the student and in the teacher.

No projection, so any two widths can be compared. Positions are compared within windows of W rows of one sequence;
windows are cut from each sequence's own start, so packing changes nothing. States are normalised row by row (and the
teacher's channels by their root mean square first), so nothing depends on which other rows share a batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.config.training import RelationSpec
from pipeline.errors import RecipeError

PADDING = -1


def relation_loss(
    student_TD: Tensor,
    teacher_TE: Tensor,
    rms_E: Tensor,
    weight_T: Tensor,
    sequence_rows: Sequence[int],
    spec: RelationSpec,
) -> Tensor:
    """Sum over rows of weight times the row's relation loss.

    `sequence_rows`: rows of each packed sequence, in order; rows after their sum are padding. `similarity_kl`: mean
    over heads of KL(R_teacher || R_student), R = softmax of the causal self-similarities of the window over
    sqrt(width of a head). `gram`: mean over the window of the squared difference of the cosines, all pairs. Raises
    RecipeError where the heads do not divide both widths.
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
    """int64 [windows, W]: the rows of each window, PADDING behind a sequence's end."""
    windows, start = [], 0
    for rows in sequence_rows:
        count = -(-rows // window)
        at = torch.arange(count * window).reshape(count, window)
        windows.append(torch.where(at < rows, at + start, PADDING))
        start += rows
    return torch.cat(windows) if windows else torch.empty((0, window), dtype=torch.int64)


def _unit_rows(state_TD: Tensor, index_GW: Tensor, heads: int) -> Tensor:
    """[N, heads, W, D / heads]: windows of states, each head of each row of length 1; padding is 0."""
    width = state_TD.shape[1]
    if width % heads:
        raise RecipeError(f"training.relation.heads: expected a divisor of the hidden width {width}, got {heads}")
    window_GWHQ = state_TD[index_GW.clamp_min(0)].reshape(*index_GW.shape, heads, width // heads)
    window_GWHQ = window_GWHQ.masked_fill((index_GW == PADDING)[:, :, None, None], 0.0)
    return torch.nn.functional.normalize(window_GWHQ, dim=3).transpose(1, 2)


def _similarity_kl(student_GHWQ: Tensor, teacher_GHWQ: Tensor, valid_GW: Tensor) -> Tensor:
    """KL a row, mean over heads. Keys of row t: rows 0..t of its window, none of which can be padding."""
    student_GHWW, teacher_GHWW = _log_relation(student_GHWQ), _log_relation(teacher_GHWQ)
    kl_GHW = torch.nn.functional.kl_div(student_GHWW, teacher_GHWW, reduction="none", log_target=True).sum(dim=3)
    return kl_GHW.mean(dim=1)


def _log_relation(unit_GHWQ: Tensor) -> Tensor:
    """log softmax of sqrt(R) * cosine over earlier rows: what states of unit mean square give, over sqrt(R)."""
    window, width = unit_GHWQ.shape[2:]
    score_GHWW = (unit_GHWQ @ unit_GHWQ.transpose(2, 3)) * width**0.5
    later_WW = torch.ones(window, window, dtype=torch.bool, device=unit_GHWQ.device).triu(1)
    # Finite, so that a forbidden pair gives 0 * (x - x) = 0 and not nan; its probability is exactly 0 all the same.
    return torch.log_softmax(score_GHWW.masked_fill(later_WW, -1.0e4), dim=3)


def _gram(student_GHWQ: Tensor, teacher_GHWQ: Tensor, valid_GW: Tensor) -> Tensor:
    """Mean over the window's rows of (cosine_teacher - cosine_student)^2, a row."""
    gap_GWW = (_cosines(teacher_GHWQ) - _cosines(student_GHWQ)).square().squeeze(1)
    return gap_GWW.sum(dim=2) / valid_GW.sum(dim=1, keepdim=True)


def _cosines(unit_GHWQ: Tensor) -> Tensor:
    return unit_GHWQ @ unit_GHWQ.transpose(2, 3)
