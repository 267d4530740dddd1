"""Reduction of logits to signals on the device. `reference` defines the same signals in float64.

`reduce_rows` uses the kernels of `fused` where they exist, otherwise `eager_signals`, which works for any mode, dtype
and device. With x = z - max z for a row of logits z, and e = exp(x):

    log p_v              = x_v - log Z,  Z = sum_v e_v
    entropy              = log Z - sum_v e_v x_v / Z
    log-partition at 2   = log sum_v sqrt(e_v) - log Z / 2
    log-partition at any = logsumexp(x / temperature) - log Z / temperature
    tail's log-mass      = log sum_{v not kept} e_v - log Z

The terms of the k largest logits are summed separately (see `entries.Block`). Rows whose tail underflows in float32 are
recomputed in float64 and log space (`underflow`). Logits are reduced in blocks of rows that fit the CPU's cache.

Kept entries are ordered by falling weight, ties by rising id. `torch.topk` leaves the order of ties open, and bfloat16
logits have many, so `best_ids` fetches more than k and sorts them.
"""

import torch
from torch import Tensor

from actors.signals.entries import Block, Entries, best_ids, select_entries
from actors.signals.fused import fused_signals, is_fused
from actors.signals.rows import RowSignals, concatenate
from actors.signals.underflow import recompute_rows, rows_to_recompute
from pipeline.contracts import CaptureSpec, TargetMode

_BLOCK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Logits of a block, by device."""
_ALIGNED_ELEMENTS = 16
"""Rows start at multiples of this: the order of summation in BLAS' dot products depends on alignment."""


def reduce_rows(
    logits_RV: Tensor,
    label_R: Tensor,
    spec: CaptureSpec,
    uniform_RU: Tensor | None = None,
    boundary_V: Tensor | None = None,
) -> RowSignals:
    """Reduce R rows of logits to signals, in float64 for float64 logits and in float32 for any other dtype.

    `label_R` has the next token's ids, `uniform_RU` the float64 numbers of `row_uniforms` (sampling modes only),
    `boundary_V` is True for tokens that start a word (`boundary` only). Rows are independent: any split of R gives the
    same bytes.
    """
    if is_fused(logits_RV.device, logits_RV.dtype, spec):
        return fused_signals(logits_RV, label_R.long(), spec, boundary_V)
    return eager_signals(logits_RV, label_R, spec, uniform_RU, boundary_V)


def eager_signals(
    logits_RV: Tensor, label_R: Tensor, spec: CaptureSpec, uniform_RU: Tensor | None, boundary_V: Tensor | None
) -> RowSignals:
    """Reduce as `reduce_rows` does, with torch operations: any mode, dtype and device."""
    rows, vocabulary = logits_RV.shape
    block = max(1, _BLOCK_ELEMENTS.get(logits_RV.device.type, _BLOCK_ELEMENTS["cuda"]) // vocabulary)
    dtype = torch.float64 if logits_RV.dtype is torch.float64 else torch.float32
    scratch = _aligned((2, min(block, rows), vocabulary), dtype, logits_RV.device)
    mask_V = None if boundary_V is None else boundary_V.to(logits_RV.device)
    parts = []
    for start in range(0, rows, block):
        span = slice(start, min(start + block, rows))
        uniform = None if uniform_RU is None else uniform_RU[span]
        one = _make_block(logits_RV[span], spec, scratch)
        parts.append(_reduce_block(one, label_R[span].long(), spec, uniform, mask_V))
    return concatenate(parts)


def _aligned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a tensor whose rows start at multiples of _ALIGNED_ELEMENTS."""
    *rows, vocabulary = shape
    width = -(-vocabulary // _ALIGNED_ELEMENTS) * _ALIGNED_ELEMENTS
    return torch.empty(*rows, width, dtype=dtype, device=device)[..., :vocabulary]


def _make_block(logits_RV: Tensor, spec: CaptureSpec, scratch: Tensor) -> Block:
    """Compute x, e and the k largest of these rows, in `scratch`, which the next block overwrites."""
    x_RV, e_RV = scratch[:, : len(logits_RV)]
    if logits_RV.dtype != x_RV.dtype:  # convert once, not in every operation
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
    partitions = [_log_partition(block, log_total_R, t) for t in spec.temperatures]
    boundary_R = None if boundary_V is None else _boundary_sum(block, boundary_V)
    entries = select_entries(block, spec, uniform_RU)
    tail_R = _tail_sum(block, entries)
    signals = RowSignals(
        entry_id_RK=entries.id_RK.int(),
        entry_logweight_RK=entries.logweight_RK.float(),
        tail_logmass_R=tail_R.log() - log_total_R if entries.omitted_R is None else entries.omitted_R.log(),
        label_logprob_R=block.logprob_at(label_R[:, None])[:, 0],
        entropy_R=entropy_R,
        log_partition_RC=torch.stack(partitions, dim=1) if partitions else log_total_R.new_zeros(len(log_total_R), 0),
        tail_shape_R3=_tail_shape(block, log_total_R, tail_R) if spec.any_temperature else None,
        boundary_logmass_R=None if boundary_R is None else boundary_R.log() - log_total_R,
    )
    redo_R = rows_to_recompute(tail_R, entropy_R, boundary_R)
    if bool(redo_R.any()):
        recompute_rows(signals, block.x_RV, entries, boundary_V, redo_R)
    return signals


def _boundary_sum(block: Block, boundary_V: Tensor) -> Tensor:
    best_R = torch.where(boundary_V[block.best_RK], block.best_e_RK, 0.0).sum(-1)
    return torch.where(boundary_V, block.rest_e_RV, 0.0).sum(-1) + best_R


def _tail_sum(block: Block, entries: Entries) -> Tensor:
    """Return the sum of e over the tail. Modifies `rest_e_RV` in place to the tail's e: 0 at the kept entries only."""
    block.rest_e_RV.scatter_(1, block.best_RK, block.best_e_RK).scatter_(1, entries.kept_id_RK, 0.0)
    if entries.omitted_R is not None:  # kept entries are drawn from the rest too: sum all columns
        return block.rest_e_RV.sum(-1)
    return block.rest_R + block.rest_e_RV.gather(1, block.best_RK).sum(-1)


def _dot(weight_RV: Tensor, value_RV: Tensor) -> Tensor:
    """Return the row sums of products. On a CPU, `torch.dot` avoids the [R, V] array of products."""
    if weight_RV.device.type == "cpu":
        return torch.stack([torch.dot(w, v) for w, v in zip(weight_RV, value_RV, strict=True)])
    dots: Tensor = torch.linalg.vecdot(weight_RV, value_RV)
    return dots


def _log_partition(block: Block, log_total_R: Tensor, temperature: float) -> Tensor:
    if temperature == 1.0:
        return torch.zeros_like(log_total_R)
    if temperature == 2.0:
        # Terms that underflowed to 0 in e would be below e^-43.
        return (block.rest_e_RV.sqrt().sum(-1) + block.best_e_RK.sqrt().sum(-1)).log() - log_total_R / 2
    return (block.x_RV / temperature).logsumexp(-1) - log_total_R / temperature


def _tail_shape(tail: Block, log_total_R: Tensor, tail_R: Tensor) -> Tensor:
    """Return S(1/2), S'(1/2) and S'(1) of S(b) = log sum_tail exp(b log p), after `_tail_sum`."""
    e_RV = tail.rest_e_RV
    root_RV = torch.sqrt(e_RV, out=_aligned(tuple(e_RV.shape), e_RV.dtype, e_RV.device))
    root_R = root_RV.sum(-1)
    half, one = (_dot(w, tail.x_RV) / sum_R for w, sum_R in ((root_RV, root_R), (e_RV, tail_R)))
    return torch.stack([root_R.log() - log_total_R / 2, half - log_total_R, one - log_total_R], dim=1)
