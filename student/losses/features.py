"""Losses between hidden states: the student's, carried to the teacher's width by a projection that it does not own.

The teacher's channels differ in size by orders of magnitude, so both sides are divided by its per-channel root mean
square, taken from the data: otherwise a handful of outlier channels is all that the loss sees.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.errors import RecipeError

AFTER_NORM = -1
"""The state after the final norm, on either side."""


class Projections(nn.Module):
    """One linear map without bias a pair of layers, from the student's width D to the teacher's width E.

    A module beside the student: trained and checkpointed with it, never part of what is exported.
    """

    balance: Tensor
    """float64 scalar: output loss over feature loss, in the step before."""

    def __init__(self, student_layers: Iterable[int], student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.maps = nn.ModuleDict(
            {str(layer): nn.Linear(student_width, teacher_width, bias=False) for layer in student_layers}
        )
        self.register_buffer("balance", torch.ones((), dtype=torch.float64))

    def weight_ED(self, student_layer: int) -> Tensor:  # noqa: N802
        """The map of one student layer, as `feature_loss` takes it."""
        weight = self.maps[str(student_layer)].weight
        assert isinstance(weight, Tensor)
        return weight


def feature_loss(
    student_TD: Tensor,
    teacher_TE: Tensor,
    projection_ED: Tensor | None,
    rms_E: Tensor,
    weight_T: Tensor,
    kind: Literal["mse", "cosine"],
) -> Tensor:
    """Sum over rows of weight times the distance of P h_s to h_t, both divided by `rms_E`.

    `mse`: mean over channels of the squared difference. `cosine`: 1 - cosine. `projection_ED` None: equal widths, no
    map. Computed in float32 (float64 for float64 input), the teacher held fixed.
    """
    projected_TE = student_TD if projection_ED is None else student_TD @ projection_ED.t()
    value_dtype = torch.promote_types(student_TD.dtype, torch.float32)
    scale_E = rms_E.to(value_dtype)
    projected_TE = projected_TE.to(value_dtype) / scale_E
    goal_TE = teacher_TE.detach().to(value_dtype) / scale_E
    if kind == "mse":
        loss_T = (projected_TE - goal_TE).square().mean(dim=1)
    else:
        loss_T = 1.0 - torch.cosine_similarity(projected_TE, goal_TE, dim=1)
    # Not a plain product: a row that does not count may hold anything, and 0 * nan is nan.
    return torch.where(weight_T != 0, weight_T * loss_T, 0.0).sum()


def channel_rms(blocks: Iterable[Tensor], floor: float = 1e-6) -> Tensor:
    """Root mean square of each channel over all rows of `blocks` ([rows, E] each), float32, `floor` at least.

    Sums in float64, in the order given. Raises ValueError without rows.
    """
    square_E, rows = None, 0
    for block_RE in blocks:
        block_square_E = block_RE.double().square().sum(dim=0)
        square_E = block_square_E if square_E is None else square_E + block_square_E
        rows += block_RE.shape[0]
    if square_E is None or rows == 0:
        raise ValueError("channel_rms: expected at least one row, got none")
    return (square_E / rows).sqrt().clamp_min(floor).float()


def match_layers(
    student_layers: int,
    teacher_layers: int,
    captured: Sequence[int],
    explicit: Mapping[int, int] | None = None,
    inherited: Sequence[int] | None = None,
) -> dict[int, int]:
    """Student layer -> captured teacher layer: `explicit` as it is, by what was `inherited`, or spread evenly.

    `inherited`: the teacher's decoder layers (from 0) that the student was made of. State t has passed the teacher's
    decoder layers below t; it is met after as many of the student's as were kept of those. Evenly: by student layer
    round(t * S / T). -1 (after the final norm) is met by -1; where two fall on one student layer, the later stays.
    Raises RecipeError for a layer that does not exist or was not captured.
    """
    if explicit is not None:
        _check_layers(explicit, student_layers, captured)
        return dict(explicit)
    if not captured:
        raise RecipeError("training.losses: expected captured hidden states, got none; set capture.hidden_layers")
    spread: dict[int, int] = {}
    for layer in sorted(layer for layer in captured if layer >= 0):
        evenly = round(layer * student_layers / teacher_layers)
        spread[evenly if inherited is None else sum(kept < layer for kept in inherited)] = layer
    return spread | ({AFTER_NORM: AFTER_NORM} if AFTER_NORM in captured else {})


def _check_layers(explicit: Mapping[int, int], student_layers: int, captured: Sequence[int]) -> None:
    for student_layer, teacher_layer in explicit.items():
        if not AFTER_NORM <= student_layer <= student_layers:
            raise RecipeError(f"layer_map: expected student layers -1 to {student_layers}, got {student_layer}")
        if teacher_layer not in captured:
            raise RecipeError(
                f"layer_map: teacher layer {teacher_layer} was not captured, only {sorted(captured)}; "
                "add it to capture.hidden_layers"
            )
