"""`reduce` for a GPU: every sum over a row in one Triton kernel, which reads each logit once and writes none.

The k best are looked for first and set to -inf while the kernel runs, so that its sums are those over the rest; what
the best add is a matter of K numbers a row. The chunk of logits is all the memory that this takes, whatever its dtype.

Compiled for a GPU, and run in Triton's interpreter on a CPU by the tests of the eager path (test_fused.py). No
GPU was at hand to run it on: no time is claimed for it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.signals.doubtful import doubtful_rows, redo_doubtful
from actors.signals.entries import Entries, best_ids, prefix
from actors.signals.rows import RowSignals
from pipeline.contracts import CaptureSpec

BLOCK = 4096
"""Logits that one program holds at a time."""
_MASS, _PRODUCT, _BOUNDARY, _ROOT, _ROOT_PRODUCT, _POWERS = range(6)
"""Columns of the sums; one for each temperature follows from the last on."""


def fused_signals(logits_RV: Tensor, label_R: Tensor, spec: CaptureSpec, boundary_V: Tensor | None) -> RowSignals:
    """See `actors.signals.reduce.reduce_rows`; `topk` and `topp` alone. Logits are as they were when this returns."""
    boundary_V = None if boundary_V is None else boundary_V.to(logits_RV.device)
    dtype = torch.float64 if logits_RV.dtype is torch.float64 else torch.float32
    best_RK = best_ids(logits_RV, spec.k)
    logit_RK = logits_RV.gather(1, best_RK)
    peak_R = logit_RK[:, 0].to(dtype).contiguous()
    label_x_R = logits_RV.gather(1, label_R[:, None])[:, 0].to(dtype) - peak_R
    logits_RV.scatter_(1, best_RK, -torch.inf)
    rest_RS = _rest_sums(logits_RV, peak_R, spec, boundary_V)
    logits_RV.scatter_(1, best_RK, logit_RK)
    row = _Row(rest_RS, best_RK, logit_RK.to(dtype) - peak_R[:, None])
    entries = prefix(best_RK, row.x_RK - row.log_total_R[:, None], spec)
    tail = row.tail(entries)
    boundary_R = None if boundary_V is None else row.boundary(boundary_V)
    signals = RowSignals(
        entry_id_RK=entries.id_RK.int(),
        entry_logweight_RK=entries.logweight_RK.float(),
        tail_logmass_R=tail.mass_R.log() - row.log_total_R,
        label_logprob_R=label_x_R - row.log_total_R,
        entropy_R=row.entropy(),
        log_partition_RC=row.log_partitions(spec.temperatures),
        tail_shape_R3=tail.shape(row.log_total_R) if spec.any_temperature else None,
        boundary_logmass_R=None if boundary_R is None else boundary_R.log() - row.log_total_R,
    )
    doubtful_R = doubtful_rows(tail.mass_R, signals.entropy_R, boundary_R)
    if bool(doubtful_R.any()):
        redo_doubtful(signals, logits_RV, entries, boundary_V, doubtful_R)
    return signals


@dataclass(frozen=True, slots=True)
class _Tail:
    """Sums over what is not kept: of e, e x, sqrt(e), sqrt(e) x."""

    mass_R: Tensor
    product_R: Tensor
    root_R: Tensor
    root_product_R: Tensor

    def shape(self, log_total_R: Tensor) -> Tensor:
        """S(1/2), S'(1/2), S'(1) of `pipeline.contracts.Signals`."""
        half_R, one_R = self.root_product_R / self.root_R, self.product_R / self.mass_R
        parts = [self.root_R.log() - log_total_R / 2, half_R - log_total_R, one_R - log_total_R]
        return torch.stack(parts, dim=1)


class _Row:
    """Rows as the sums over their rest, and their k best one by one: `x` from the peak, `e` = exp(x)."""

    def __init__(self, rest_RS: Tensor, best_RK: Tensor, x_RK: Tensor) -> None:
        self._rest_RS, self._best_RK, self.x_RK, self._e_RK = rest_RS, best_RK, x_RK, x_RK.exp()
        self._total_R = rest_RS[:, _MASS] + self._e_RK.sum(1)
        self.log_total_R = self._total_R.log()

    def entropy(self) -> Tensor:
        """Nats; not finite where a best token cannot occur."""
        product_R = self._rest_RS[:, _PRODUCT] + (self._e_RK * self.x_RK).sum(1)
        return self.log_total_R - product_R / self._total_R

    def boundary(self, boundary_V: Tensor) -> Tensor:
        """Sum of e over the tokens that start a word."""
        best_R = torch.where(boundary_V[self._best_RK], self._e_RK, 0.0).sum(1)
        return self._rest_RS[:, _BOUNDARY] + best_R

    def log_partitions(self, temperatures: tuple[float, ...]) -> Tensor:
        """[R, C] log-partitions, 0 at temperature 1."""
        found_RC = self.log_total_R.new_zeros(len(self.log_total_R), len(temperatures))
        for number, temperature in enumerate(temperatures):
            if temperature != 1.0:
                best_R = (self.x_RK / temperature).exp().sum(1)
                sum_R = self._rest_RS[:, _POWERS + number] + best_R
                found_RC[:, number] = sum_R.log() - self.log_total_R / temperature
        return found_RC

    def tail(self, entries: Entries) -> _Tail:
        """The rest, and those of the best that are not kept."""
        left_RK = torch.isneginf(entries.logweight_RK) & (self._e_RK > 0)
        x_RK = torch.where(left_RK, self.x_RK, 0.0)
        e_RK, root_RK = (torch.where(left_RK, (x_RK * power).exp(), 0.0) for power in (1.0, 0.5))
        best = (values_RK.sum(1) for values_RK in (e_RK, e_RK * x_RK, root_RK, root_RK * x_RK))
        rest = (self._rest_RS[:, column] for column in (_MASS, _PRODUCT, _ROOT, _ROOT_PRODUCT))
        return _Tail(*(ours + others for ours, others in zip(rest, best, strict=True)))


def _rest_sums(logits_RV: Tensor, peak_R: Tensor, spec: CaptureSpec, boundary_V: Tensor | None) -> Tensor:
    """[R, columns] sums over all that is not -inf, in the dtype of `peak`."""
    rows, vocabulary = logits_RV.shape
    powers = triton.next_power_of_2(max(1, len(spec.temperatures)))
    rest_RS = peak_R.new_zeros(rows, _POWERS + powers)
    inverse_C = torch.zeros(powers, dtype=peak_R.dtype)
    inverse_C[: len(spec.temperatures)] = 1 / torch.tensor(spec.temperatures, dtype=peak_R.dtype)
    mask_V = logits_RV if boundary_V is None else boundary_V.to(torch.int8)
    with torch.cuda.device_of(logits_RV):  # type: ignore[no-untyped-call]
        _sum_rows[(rows,)](
            *(logits_RV, peak_R, mask_V, inverse_C.to(logits_RV.device), rest_RS),
            *(vocabulary, logits_RV.stride(0), logits_RV.stride(1), rest_RS.stride(0)),
            boundary_V is not None, spec.any_temperature, any(t != 1.0 for t in spec.temperatures), powers, BLOCK,
        )  # fmt: skip
    return rest_RS


@triton.jit  # type: ignore[untyped-decorator]
def _sum_rows(
    logits: tl.tensor, peak: tl.tensor, boundary: tl.tensor, inverse: tl.tensor, sums: tl.tensor,
    vocabulary: tl.tensor, stride: tl.tensor, step: tl.tensor, sums_stride: tl.tensor,
    HAS_BOUNDARY: tl.constexpr, HAS_SHAPE: tl.constexpr, HAS_POWERS: tl.constexpr, POWERS: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """One program a row. The columns are `_MASS` and those after it; a column that is not asked for stays 0."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = sums.dtype.element_ty
    own, peak_ = sums + row * sums_stride, tl.load(peak + row)
    mass, product = tl.full((), 0.0, dtype), tl.full((), 0.0, dtype)
    starts, root, root_product = tl.full((), 0.0, dtype), tl.full((), 0.0, dtype), tl.full((), 0.0, dtype)
    power_at = tl.arange(0, POWERS)
    inverse_ = tl.load(inverse + power_at)
    powers = tl.full((POWERS,), 0.0, dtype)
    for first in range(0, vocabulary, SIZE):
        at = first + tl.arange(0, SIZE)
        inside = at < vocabulary
        z = tl.load(logits + row * stride + at.to(tl.int64) * step, mask=inside, other=float("-inf"))
        x = z.to(dtype) - peak_
        left = x > float("-inf")  # exp(-inf) * -inf would be nan
        below = tl.where(left, x, 0.0)
        e = tl.where(left, tl.exp(below), 0.0)
        mass += tl.sum(e, axis=0)
        product += tl.sum(e * below, axis=0)
        if HAS_BOUNDARY:
            starts += tl.sum(tl.where(tl.load(boundary + at, mask=inside, other=0) != 0, e, 0.0), axis=0)
        if HAS_SHAPE:
            half = tl.where(left, tl.exp(below * 0.5), 0.0)
            root += tl.sum(half, axis=0)
            root_product += tl.sum(half * below, axis=0)
        if HAS_POWERS:
            scaled = tl.exp(below[None, :] * inverse_[:, None])
            powers += tl.sum(tl.where(left[None, :], scaled, 0.0), axis=1)
    tl.store(own, mass)
    tl.store(own + 1, product)
    tl.store(own + 2, starts)
    tl.store(own + 3, root)
    tl.store(own + 4, root_product)
    tl.store(own + 5 + power_at, powers)
