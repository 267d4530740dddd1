"""Logits to signals, on the device, in few passes: what `actors.reference` defines, at the speed that capture needs.

A chunk of logits is reduced in blocks of rows that fit a cache. One softmax gives the probabilities p of a block; the
rest are sums over it. No difference of nearly equal sums appears anywhere: the tail's mass is summed over the tail
itself, and rows where that sum leaves float32 (a tail below e^-69) are done again in float64 and log space.

    log p_v       = (x_v - max x) - spread,  spread = lse - max x = -log max p
    entropy       = lse - sum_v p_v x_v
    partition(2)  = log sum_v sqrt(p_v);  any other T: logsumexp(x / T) - lse / T
    tail          = log sum_{v not kept} p_v

Kept entries come in `pipeline.contracts`' order: by falling weight, ties by rising id. `torch.topk` breaks ties as it
likes, and rows of bfloat16 logits are full of ties, so some more than k are fetched and put in order; see `_best`.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from actors.entries import Block, Entries, choose
from pipeline.contracts import CaptureSpec

_BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
_SAFE_MASS = 1e-30
"""Sums of float32 probabilities below this may have lost terms to underflow."""


@dataclass(frozen=True, slots=True)
class RowSignals:
    """Signals of R rows, on the device that computed them. Fields as in `pipeline.contracts.Signals`."""

    entry_id_RK: Tensor
    entry_logweight_RK: Tensor
    tail_logmass_R: Tensor
    label_logprob_R: Tensor
    entropy_R: Tensor
    log_partition_RC: Tensor
    tail_shape_R3: Tensor | None
    boundary_logmass_R: Tensor | None


def reduce_rows(
    logits_RV: Tensor,
    label_R: Tensor,
    spec: CaptureSpec,
    uniform_RU: Tensor | None = None,
    boundary_V: Tensor | None = None,
) -> RowSignals:
    """Signals of R rows of logits (any float dtype; float64 is computed in float64, all else in float32).

    `label_R` holds the next token's id, `uniform_RU` the float64 numbers of `actors.sampling` (sampling modes only),
    `boundary_V` True for tokens that start a word (`boundary` only). Rows are independent: splitting R changes nothing.
    """
    rows, vocabulary = logits_RV.shape
    block = max(1, _BLOCK_ELEMENTS.get(logits_RV.device.type, 1 << 26) // vocabulary)
    mask_V = None if boundary_V is None else boundary_V.to(logits_RV.device)
    parts = [
        _reduce_block(
            logits_RV[start : start + block],
            label_R[start : start + block].long(),
            spec,
            None if uniform_RU is None else uniform_RU[start : start + block],
            mask_V,
        )
        for start in range(0, rows, block)
    ]
    return concatenate(parts)


def concatenate(parts: list[RowSignals]) -> RowSignals:
    """The rows of all parts, in order. At least one part."""
    if len(parts) == 1:
        return parts[0]
    columns: dict[str, Any] = {}
    for name in (f.name for f in fields(RowSignals)):
        pieces = [getattr(part, name) for part in parts]
        columns[name] = None if pieces[0] is None else torch.cat(pieces)
    return RowSignals(**columns)


def _reduce_block(
    logits_RV: Tensor, label_R: Tensor, spec: CaptureSpec, uniform_RU: Tensor | None, boundary_V: Tensor | None
) -> RowSignals:
    block = Block.of(logits_RV)
    x_RV, p_RV, lse_R = block.x_RV, block.p_RV, block.peak_R + block.spread_R
    entropy_R = lse_R - torch.linalg.vecdot(p_RV, x_RV)
    partitions = [_partition(x_RV, p_RV, lse_R, t) for t in spec.temperatures]
    boundary_R = None if boundary_V is None else torch.where(boundary_V, p_RV, 0.0).sum(-1).log()
    entries = choose(block, spec, uniform_RU)
    _strike_out(p_RV, entries, 0.0)
    tail_R = p_RV.sum(-1)
    shape_R3 = _tail_shape(x_RV, p_RV, lse_R, tail_R) if spec.any_temperature else None
    signals = RowSignals(
        entry_id_RK=entries.id_RK.int(),
        entry_logweight_RK=entries.logweight_RK.float(),
        tail_logmass_R=tail_R.log() if entries.missed_R is None else entries.missed_R.log(),
        label_logprob_R=block.logprob_at(label_R[:, None])[:, 0],
        entropy_R=entropy_R,
        log_partition_RC=torch.stack(partitions, dim=1) if partitions else x_RV.new_zeros(len(x_RV), 0),
        tail_shape_R3=shape_R3,
        boundary_logmass_R=boundary_R,
    )
    doubtful_R = (tail_R < _SAFE_MASS) | ~torch.isfinite(entropy_R)
    if boundary_R is not None:
        doubtful_R |= boundary_R.exp() < _SAFE_MASS
    if bool(doubtful_R.any()):
        _redo(signals, x_RV, entries, boundary_V, doubtful_R)
    return signals


def _strike_out(values_RV: Tensor, entries: Entries, value: float) -> None:
    """Write the value where a token is kept."""
    rows, columns = entries.kept_RK.nonzero(as_tuple=True)
    values_RV[rows, entries.kept_id_RK[rows, columns]] = value


def _partition(x_RV: Tensor, p_RV: Tensor, lse_R: Tensor, temperature: float) -> Tensor:
    if temperature == 1.0:
        return torch.zeros_like(lse_R)
    if temperature == 2.0:
        return p_RV.sqrt().sum(-1).log()  # what underflowed in p was below e^-43 here
    return (x_RV / temperature).logsumexp(-1) - lse_R / temperature


def _tail_shape(x_RV: Tensor, tail_RV: Tensor, lse_R: Tensor, tail_R: Tensor) -> Tensor:
    """S(1/2), S'(1/2) and S'(1) of the tail's log-sum S(b) = log sum_tail exp(b log p)."""
    root_RV = tail_RV.sqrt()
    root_R = root_RV.sum(-1)
    slopes = [torch.linalg.vecdot(w, x_RV) / total - lse_R for w, total in ((root_RV, root_R), (tail_RV, tail_R))]
    return torch.stack([root_R.log(), *slopes], dim=1)


def _redo(signals: RowSignals, x_RV: Tensor, entries: Entries, boundary_V: Tensor | None, doubtful_R: Tensor) -> None:
    """Write the doubtful rows' sums again, computed in float64 and log space."""
    logprob_RV = torch.log_softmax(x_RV.double(), dim=-1)
    tail_RV = logprob_RV.clone()
    _strike_out(tail_RV, entries, -torch.inf)
    redone = {
        "entropy_R": -_mean(logprob_RV, logprob_RV, 1.0),
        "tail_logmass_R": tail_RV.logsumexp(-1) if entries.missed_R is None else None,
        "tail_shape_R3": torch.stack(
            [(tail_RV / 2).logsumexp(-1), _mean(tail_RV, tail_RV, 0.5), _mean(tail_RV, tail_RV, 1.0)], dim=1
        ),
        "boundary_logmass_R": None
        if boundary_V is None
        else torch.where(boundary_V, logprob_RV, -torch.inf).logsumexp(-1),
    }
    for name, value in redone.items():
        column = getattr(signals, name)
        if column is not None and value is not None:
            column[doubtful_R] = value[doubtful_R].to(column.dtype)


def _mean(logweight_RV: Tensor, value_RV: Tensor, power: float) -> Tensor:
    """Mean of the values under weights to the power; 0 where no weight is left. No weight times -inf is 0."""
    weight_RV = torch.softmax(logweight_RV * power, dim=-1)
    mean_R = torch.where(weight_RV == 0, 0.0, weight_RV * value_RV).sum(-1)
    return torch.where(logweight_RV.amax(-1) == -torch.inf, 0.0, mean_R)
