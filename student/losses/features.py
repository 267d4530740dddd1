"""Feature loss: distance of projected student states to teacher states (FitNets, Romero et al. 2015).

The teacher's channels differ in size by orders of magnitude, so both sides are divided by the teacher's root mean
square per channel, measured on the data: otherwise a few outlier channels dominate the loss.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.errors import RecipeError

AFTER_NORM = -1
"""Number of the state after the final norm, in student and teacher."""


class Projections(nn.Module):
    """One linear map without bias per matched layer, from the student's width D to the teacher's width E.

    A module beside the student: trained and checkpointed with it, but not exported.
    """

    balance: Tensor
    """float64 scalar: output loss / feature loss of the previous step (`training.feature.balance`)."""

    def __init__(self, student_layers: Iterable[int], student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.maps = nn.ModuleDict(
            {str(layer): nn.Linear(student_width, teacher_width, bias=False) for layer in student_layers}
        )
        self.register_buffer("balance", torch.ones((), dtype=torch.float64))

    def weight_ED(self, student_layer: int) -> Tensor:  # noqa: N802
        """Return the weight [E, D] of the map of one student layer."""
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
    """Sum over rows of weight * distance(P h_student / rms, h_teacher / rms).

    `mse` is the mean over channels of the squared difference, `cosine` is 1 - cosine similarity. `projection_ED` is
    None for equal widths without a map. Computed in float32 (float64 for float64 input); the teacher gets no gradient.
    """
    projected_TE = student_TD if projection_ED is None else student_TD @ projection_ED.t()
    value_dtype = torch.promote_types(student_TD.dtype, torch.float32)
    scale_E = rms_E.to(value_dtype)
    projected_TE = projected_TE.to(value_dtype) / scale_E
    scaled_teacher_TE = teacher_TE.detach().to(value_dtype) / scale_E
    if kind == "mse":
        loss_T = (projected_TE - scaled_teacher_TE).square().mean(dim=1)
    else:
        loss_T = 1.0 - torch.cosine_similarity(projected_TE, scaled_teacher_TE, dim=1)
    # `where`, because a row of weight 0 may contain nan, and 0 * nan is nan.
    return torch.where(weight_T != 0, weight_T * loss_T, 0.0).sum()


def channel_rms(state_RE: Tensor, floor: float = 1e-6) -> Tensor:
    """Return the root mean square of each channel over R rows, float32 [E], at least `floor`. ValueError for R = 0."""
    if len(state_RE) == 0:
        raise ValueError("channel_rms: expected at least one row, got none")
    return state_RE.double().square().mean(dim=0).sqrt().clamp_min(floor).float()


def match_layers(
    student_layers: int,
    teacher_layers: int,
    captured: Sequence[int],
    explicit: Mapping[int, int] | None = None,
    inherited: Sequence[int] | None = None,
) -> dict[int, int]:
    """Return a map from student state to captured teacher state, numbered as in `pipeline.contracts`.

    `explicit` is checked and returned. Otherwise teacher state t is matched with student state s: the number of
    layers below t in `inherited`, the teacher's decoder layers (from 0) that the student was pruned to, or
    round(t * student_layers / teacher_layers) if it is None. -1 (after the final norm) is matched with -1. Of several
    teacher states for one s the last is kept. Raises RecipeError for a layer that does not exist or was not captured.
    """
    if explicit is not None:
        _check_layers(explicit, student_layers, captured)
        return dict(explicit)
    if not captured:
        raise RecipeError("training.losses: expected captured hidden states, got none; set capture.hidden_layers")
    matched: dict[int, int] = {}
    for layer in sorted(layer for layer in captured if layer >= 0):
        proportional = round(layer * student_layers / teacher_layers)
        matched[proportional if inherited is None else sum(kept < layer for kept in inherited)] = layer
    return matched | ({AFTER_NORM: AFTER_NORM} if AFTER_NORM in captured else {})


def _check_layers(explicit: Mapping[int, int], student_layers: int, captured: Sequence[int]) -> None:
    for student_layer, teacher_layer in explicit.items():
        if not AFTER_NORM <= student_layer <= student_layers:
            raise RecipeError(f"layer_map: expected student layers -1 to {student_layers}, got {student_layer}")
        if teacher_layer not in captured:
            raise RecipeError(
                f"layer_map: teacher layer {teacher_layer} was not captured, only {sorted(captured)}; "
                "add it to capture.hidden_layers"
            )
