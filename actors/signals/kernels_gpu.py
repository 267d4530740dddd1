"""Kernels of the fused reduction for a GPU: `rest_sums` in Triton, reading each logit once.

test_fused.py runs the eager reduction's tests on it in Triton's interpreter on a CPU, and compiles it for a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from actors.signals import sums
from actors.signals.entries import best_ids
from pipeline.contracts import CaptureSpec

__all__ = ["best_ids", "rest_sums"]

BLOCK = 4096
"""Logits that one program loads at a time."""


def rest_sums(logits_RV: Tensor, peak_R: Tensor, spec: CaptureSpec, boundary_V: Tensor | None) -> Tensor:
    """Return the [R, A] sums (see `sums`) over the logits that are not -inf, in the dtype of `peak_R`."""
    rows, vocabulary = logits_RV.shape
    powers = triton.next_power_of_2(max(1, len(spec.temperatures)))
    rest_RA = peak_R.new_zeros(rows, sums.POWERS + powers)
    inverse_C = torch.zeros(powers, dtype=peak_R.dtype)
    inverse_C[: len(spec.temperatures)] = 1 / torch.tensor(spec.temperatures, dtype=peak_R.dtype)
    mask_V = logits_RV if boundary_V is None else boundary_V.to(torch.int8)
    with torch.cuda.device_of(logits_RV):  # type: ignore[no-untyped-call]
        _sum_rows[(rows,)](
            *(logits_RV, peak_R, mask_V, inverse_C.to(logits_RV.device), rest_RA),
            *(vocabulary, logits_RV.stride(0), logits_RV.stride(1), rest_RA.stride(0)),
            boundary_V is not None, spec.any_temperature, any(t != 1.0 for t in spec.temperatures), powers, BLOCK,
        )  # fmt: skip
    return rest_RA


@triton.jit  # type: ignore[untyped-decorator]
def _sum_rows(
    logits: tl.tensor, peak: tl.tensor, boundary: tl.tensor, inverse: tl.tensor, out: tl.tensor,
    vocabulary: tl.tensor, stride: tl.tensor, step: tl.tensor, out_stride: tl.tensor,
    HAS_BOUNDARY: tl.constexpr, HAS_SHAPE: tl.constexpr, HAS_POWERS: tl.constexpr, POWERS: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """Sum one row (one program a row) into the columns of `sums`; columns without their flag stay 0."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = out.dtype.element_ty
    out_row, peak_ = out + row * out_stride, tl.load(peak + row)
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
        finite = x > float("-inf")  # exp(-inf) * -inf is nan
        finite_x = tl.where(finite, x, 0.0)
        e = tl.where(finite, tl.exp(finite_x), 0.0)
        mass += tl.sum(e, axis=0)
        product += tl.sum(e * finite_x, axis=0)
        if HAS_BOUNDARY:
            starts += tl.sum(tl.where(tl.load(boundary + at, mask=inside, other=0) != 0, e, 0.0), axis=0)
        if HAS_SHAPE:
            half = tl.where(finite, tl.exp(finite_x * 0.5), 0.0)
            root += tl.sum(half, axis=0)
            root_product += tl.sum(half * finite_x, axis=0)
        if HAS_POWERS:
            scaled = tl.exp(finite_x[None, :] * inverse_[:, None])
            powers += tl.sum(tl.where(finite[None, :], scaled, 0.0), axis=1)
    tl.store(out_row, mass)
    tl.store(out_row + 1, product)
    tl.store(out_row + 2, starts)
    tl.store(out_row + 3, root)
    tl.store(out_row + 4, root_product)
    tl.store(out_row + 5 + power_at, powers)
