"""Rows whose sums underflow in float32 (a tail below 1e-30), or have probabilities of 0: recomputed in float64."""

import torch
from torch import Tensor

from actors.signals.entries import Entries
from actors.signals.rows import RowSignals

SMALLEST_SUM = 1e-30
"""A smaller float32 sum of e = exp(x) may have lost terms to underflow (the least normal float32 is 1e-38)."""


def rows_to_recompute(tail_R: Tensor, entropy_R: Tensor, boundary_R: Tensor | None) -> Tensor:
    """Return a [R] mask of rows where the tail's or boundary's sum is too small or the entropy is not finite."""
    redo_R = (tail_R < SMALLEST_SUM) | ~torch.isfinite(entropy_R)
    return redo_R if boundary_R is None else redo_R | (boundary_R < SMALLEST_SUM)


def recompute_rows(
    signals: RowSignals, logits_RV: Tensor, entries: Entries, boundary_V: Tensor | None, redo_R: Tensor
) -> None:
    """Overwrite tail, tail shape, entropy and boundary of the rows in `redo_R`, in float64 and log space.

    `logits_RV` may be logits minus any constant of the row.
    """
    logprob_RV = torch.log_softmax(logits_RV[redo_R].double(), dim=-1)
    tail_RV = logprob_RV.scatter(1, entries.kept_id_RK[redo_R], -torch.inf)
    signals.entropy_R[redo_R] = -_mean(logprob_RV, logprob_RV, 1.0).to(signals.entropy_R.dtype)
    if entries.omitted_R is None:
        signals.tail_logmass_R[redo_R] = tail_RV.logsumexp(-1).to(signals.tail_logmass_R.dtype)
    if signals.tail_shape_R3 is not None:
        derivatives = [_mean(tail_RV, tail_RV, power) for power in (0.5, 1.0)]
        shape_R3 = torch.stack([(tail_RV / 2).logsumexp(-1), *derivatives], dim=1)
        signals.tail_shape_R3[redo_R] = shape_R3.to(signals.tail_shape_R3.dtype)
    if signals.boundary_logmass_R is not None and boundary_V is not None:
        mass_R = torch.where(boundary_V, logprob_RV, -torch.inf).logsumexp(-1)
        signals.boundary_logmass_R[redo_R] = mass_R.to(signals.boundary_logmass_R.dtype)


def _mean(logweight_RV: Tensor, value_RV: Tensor, power: float) -> Tensor:
    """Return the mean of values under weights ** power; 0 times -inf counts as 0, and a row without weights gives 0."""
    weight_RV = torch.softmax(logweight_RV * power, dim=-1)
    mean_R = torch.where(weight_RV == 0, 0.0, weight_RV * value_RV).sum(-1)
    return torch.where(logweight_RV.amax(-1) == -torch.inf, 0.0, mean_R)
