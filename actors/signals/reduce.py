"""Logits to signals, on the device, in few passes: what `reference` defines, at the speed that capture needs.

A chunk of logits is reduced in blocks of rows that fit a cache. A row is shifted by its largest logit, x, and
exponentiated, e; the rest are sums over these. The k largest are taken out of every sum and added again by themselves,
so the tail's mass needs no pass of its own, and no difference of nearly equal sums appears anywhere. Rows where a sum
leaves float32 (a tail below e^-69) are done again in float64 and log space.

    log p_v       = x_v - log Z,  Z = sum_v e_v
    entropy       = log Z - sum_v e_v x_v / Z
    partition(2)  = log sum_v sqrt(e_v) - log Z / 2;  any other T: logsumexp(x / T) - log Z / T
    tail          = log sum_{v not kept} e_v - log Z

That is the eager way, for any mode, dtype and device. Where there are kernels for the logits, `fused` does the same.

Kept entries come in `pipeline.contracts`' order: by falling weight, ties by rising id. `torch.topk` breaks ties as it
likes, and rows of bfloat16 logits are full of ties, so some more than k are fetched and put in order; see `best_ids`.
"""

import torch
from torch import Tensor

from actors.signals.doubtful import doubtful_rows, redo_doubtful
from actors.signals.entries import Block, Entries, best_ids, choose
from actors.signals.fused import fused_signals, is_fused
from actors.signals.rows import RowSignals, concatenate
from pipeline.contracts import CaptureSpec, TargetMode

_BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
_ALIGNED_ELEMENTS = 16
"""Every row starts at a multiple of this, as BLAS' dot products add up in an order that the address decides."""


def reduce_rows(
    logits_RV: Tensor,
    label_R: Tensor,
    spec: CaptureSpec,
    uniform_RU: Tensor | None = None,
    boundary_V: Tensor | None = None,
) -> RowSignals:
    """Signals of R rows of logits (any float dtype; float64 is computed in float64, all else in float32).

    `label_R` holds the next token's id, `uniform_RU` the float64 numbers of `sampling` (sampling modes only),
    `boundary_V` True for tokens that start a word (`boundary` only). Rows are independent: splitting R changes nothing.
    """
    if is_fused(logits_RV.device, logits_RV.dtype, spec):
        return fused_signals(logits_RV, label_R.long(), spec, boundary_V)
    return eager_signals(logits_RV, label_R, spec, uniform_RU, boundary_V)


def eager_signals(
    logits_RV: Tensor, label_R: Tensor, spec: CaptureSpec, uniform_RU: Tensor | None, boundary_V: Tensor | None
) -> RowSignals:
    """`reduce_rows` in torch's own operations: any mode, dtype and device."""
    rows, vocabulary = logits_RV.shape
    block = max(1, _BLOCK_ELEMENTS.get(logits_RV.device.type, _BLOCK_ELEMENTS["cuda"]) // vocabulary)
    dtype = torch.float64 if logits_RV.dtype is torch.float64 else torch.float32
    scratch = _aligned((2, min(block, rows), vocabulary), dtype, logits_RV.device)
    mask_V = None if boundary_V is None else boundary_V.to(logits_RV.device)
    parts = []
    for start in range(0, rows, block):
        own = slice(start, min(start + block, rows))
        uniform = None if uniform_RU is None else uniform_RU[own]
        parts.append(_reduce_block(_shifted(logits_RV[own], spec, scratch), label_R[own].long(), spec, uniform, mask_V))
    return concatenate(parts)


def _aligned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory whose rows all start alike."""
    *rows, vocabulary = shape
    width = -(-vocabulary // _ALIGNED_ELEMENTS) * _ALIGNED_ELEMENTS
    return torch.empty(*rows, width, dtype=dtype, device=device)[..., :vocabulary]


def _shifted(logits_RV: Tensor, spec: CaptureSpec, scratch: Tensor) -> Block:
    """The block of these rows, in memory that the next block takes over."""
    x_RV, e_RV = scratch[:, : len(logits_RV)]
    if logits_RV.dtype != x_RV.dtype:  # once, rather than within every operation
        logits_RV = x_RV.copy_(logits_RV)
    best_RK = best_ids(logits_RV, 1 if spec.mode is TargetMode.SAMPLED else spec.k)
    torch.sub(logits_RV, logits_RV.gather(1, best_RK[:, :1]), out=x_RV)
    torch.exp(x_RV, out=e_RV)
    best_RK = best_RK[:, :0] if spec.mode is TargetMode.SAMPLED else best_RK
    best_e_RK = e_RV.gather(1, best_RK)
    e_RV.scatter_(1, best_RK, 0.0)
    rest_R = e_RV.sum(-1)
    return Block(x_RV, e_RV, best_RK, best_e_RK, rest_R, rest_R + best_e_RK.sum(-1))


def _reduce_block(
    block: Block, label_R: Tensor, spec: CaptureSpec, uniform_RU: Tensor | None, boundary_V: Tensor | None
) -> RowSignals:
    log_total_R = block.total_R.log()
    best_x_RK = block.x_RV.gather(1, block.best_RK)
    product_R = _dot(block.rest_e_RV, block.x_RV) + (block.best_e_RK * best_x_RK).sum(-1)
    entropy_R = log_total_R - product_R / block.total_R
    partitions = [_partition(block, log_total_R, t) for t in spec.temperatures]
    boundary_R = None if boundary_V is None else _boundary(block, boundary_V)
    entries = choose(block, spec, uniform_RU)
    tail_R = _keep(block, entries)
    signals = RowSignals(
        entry_id_RK=entries.id_RK.int(),
        entry_logweight_RK=entries.logweight_RK.float(),
        tail_logmass_R=tail_R.log() - log_total_R if entries.missed_R is None else entries.missed_R.log(),
        label_logprob_R=block.logprob_at(label_R[:, None])[:, 0],
        entropy_R=entropy_R,
        log_partition_RC=torch.stack(partitions, dim=1) if partitions else log_total_R.new_zeros(len(log_total_R), 0),
        tail_shape_R3=_tail_shape(block, log_total_R, tail_R) if spec.any_temperature else None,
        boundary_logmass_R=None if boundary_R is None else boundary_R.log() - log_total_R,
    )
    doubtful_R = doubtful_rows(tail_R, entropy_R, boundary_R)
    if bool(doubtful_R.any()):
        redo_doubtful(signals, block.x_RV, entries, boundary_V, doubtful_R)
    return signals


def _boundary(block: Block, boundary_V: Tensor) -> Tensor:
    best_R = torch.where(boundary_V[block.best_RK], block.best_e_RK, 0.0).sum(-1)
    return torch.where(boundary_V, block.rest_e_RV, 0.0).sum(-1) + best_R


def _keep(block: Block, entries: Entries) -> Tensor:
    """Sum of `e` over the tail. From here on `rest_e` is the tail's `e`: 0 at what is kept, and there alone."""
    block.rest_e_RV.scatter_(1, block.best_RK, block.best_e_RK).scatter_(1, entries.kept_id_RK, 0.0)
    if entries.missed_R is not None:  # drawn from the rest too, so there is no short way
        return block.rest_e_RV.sum(-1)
    return block.rest_R + block.rest_e_RV.gather(1, block.best_RK).sum(-1)


def _dot(weight_RV: Tensor, value_RV: Tensor) -> Tensor:
    """Row sums of products, without the array of products where that costs a pass."""
    if weight_RV.device.type == "cpu":
        return torch.stack([torch.dot(w, v) for w, v in zip(weight_RV, value_RV, strict=True)])
    dots: Tensor = torch.linalg.vecdot(weight_RV, value_RV)
    return dots


def _partition(block: Block, log_total_R: Tensor, temperature: float) -> Tensor:
    if temperature == 1.0:
        return torch.zeros_like(log_total_R)
    if temperature == 2.0:
        # What underflowed in e is below e^-43 here.
        return (block.rest_e_RV.sqrt().sum(-1) + block.best_e_RK.sqrt().sum(-1)).log() - log_total_R / 2
    return (block.x_RV / temperature).logsumexp(-1) - log_total_R / temperature


def _tail_shape(tail: Block, log_total_R: Tensor, tail_R: Tensor) -> Tensor:
    """S(1/2), S'(1/2) and S'(1) of the tail's log-sum S(b) = log sum_tail exp(b log p); see `_keep`."""
    e_RV = tail.rest_e_RV
    root_RV = torch.sqrt(e_RV, out=_aligned(tuple(e_RV.shape), e_RV.dtype, e_RV.device))
    root_R = root_RV.sum(-1)
    half, one = (_dot(w, tail.x_RV) / sum_R for w, sum_R in ((root_RV, root_R), (e_RV, tail_R)))
    return torch.stack([root_R.log() - log_total_R / 2, half - log_total_R, one - log_total_R], dim=1)
