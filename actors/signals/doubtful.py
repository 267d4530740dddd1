"""Rows whose sums leave float32: a tail below e^-69, an entropy of tokens that cannot occur. Slow, and exact."""

import torch
from torch import Tensor

from actors.signals.entries import Entries
from actors.signals.rows import RowSignals

SAFE_MASS = 1e-30
"""Sums of float32 probabilities below this may have lost terms to underflow."""


def doubtful_rows(tail_R: Tensor, entropy_R: Tensor, boundary_R: Tensor | None) -> Tensor:
    """[R] where a mass is too small for float32, or the entropy is not finite."""
    doubtful_R = (tail_R < SAFE_MASS) | ~torch.isfinite(entropy_R)
    return doubtful_R if boundary_R is None else doubtful_R | (boundary_R < SAFE_MASS)


def redo_doubtful(
    signals: RowSignals, logits_RV: Tensor, entries: Entries, boundary_V: Tensor | None, doubtful_R: Tensor
) -> None:
    """Write the doubtful rows' sums again, computed in float64 and log space. Logits may be shifted, row by row."""
    logprob_RV = torch.log_softmax(logits_RV[doubtful_R].double(), dim=-1)
    tail_RV = logprob_RV.scatter(1, entries.kept_id_RK[doubtful_R], -torch.inf)
    signals.entropy_R[doubtful_R] = -_mean(logprob_RV, logprob_RV, 1.0).to(signals.entropy_R.dtype)
    if entries.missed_R is None:
        signals.tail_logmass_R[doubtful_R] = tail_RV.logsumexp(-1).to(signals.tail_logmass_R.dtype)
    if signals.tail_shape_R3 is not None:
        slopes = [_mean(tail_RV, tail_RV, power) for power in (0.5, 1.0)]
        shape_R3 = torch.stack([(tail_RV / 2).logsumexp(-1), *slopes], dim=1)
        signals.tail_shape_R3[doubtful_R] = shape_R3.to(signals.tail_shape_R3.dtype)
    if signals.boundary_logmass_R is not None and boundary_V is not None:
        mass_R = torch.where(boundary_V, logprob_RV, -torch.inf).logsumexp(-1)
        signals.boundary_logmass_R[doubtful_R] = mass_R.to(signals.boundary_logmass_R.dtype)


def _mean(logweight_RV: Tensor, value_RV: Tensor, power: float) -> Tensor:
    """Mean of the values under weights to the power; 0 where no weight is left. No weight times -inf is 0."""
    weight_RV = torch.softmax(logweight_RV * power, dim=-1)
    mean_R = torch.where(weight_RV == 0, 0.0, weight_RV * value_RV).sum(-1)
    return torch.where(logweight_RV.amax(-1) == -torch.inf, 0.0, mean_R)
