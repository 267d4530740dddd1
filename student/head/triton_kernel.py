"""`LogitsKernel` in Triton: one read of the chunk's logits, then one read and one write, and no second [R, V] buffer.

The tests compile it for a GPU and run it in Triton's interpreter on a CPU (tests/student/head/test_triton_kernel.py).
Its time and memory on a GPU have not been measured.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits that a program loads at a time."""


class TritonLogitsKernel:
    """See `student.head.chunk.LogitsKernel`. Kept ids are set to -inf first, so that kernels need no mask for them."""

    def __init__(self, logits_RV: Tensor, id_RK: Tensor, temperature: float) -> None:
        self._logits_RV, self._temperature = logits_RV, temperature
        kept_RK = logits_RV.gather(1, id_RK)
        logits_RV.scatter_(1, id_RK, -torch.inf)
        tail_max_R, sumexp_R, scaled_sumexp_R = (logits_RV.new_empty(len(logits_RV)) for _ in range(3))
        with torch.cuda.device_of(logits_RV):  # type: ignore[no-untyped-call]
            _read_rows[(len(logits_RV),)](
                *(logits_RV, tail_max_R, sumexp_R, scaled_sumexp_R),
                *(logits_RV.shape[1], logits_RV.stride(0), temperature, BLOCK),
            )
        self.max_R = torch.cat([tail_max_R[:, None], kept_RK], dim=1).amax(dim=1)
        shift_R = tail_max_R - self.max_R
        self.tail_sumexp_R = sumexp_R * shift_R.exp()
        self.scaled_tail_sumexp_R = (
            self.tail_sumexp_R if temperature == 1.0 else scaled_sumexp_R * (shift_R / temperature).exp()
        )

    def write_(self, factor_R: Tensor, scaled_factor_R: Tensor) -> None:
        """See `student.head.chunk.LogitsKernel`."""
        rows, vocabulary = self._logits_RV.shape
        if self._temperature == 1.0:
            factor_R = factor_R + scaled_factor_R
        with torch.cuda.device_of(self._logits_RV):  # type: ignore[no-untyped-call]
            _write_rows[(rows, triton.cdiv(vocabulary, BLOCK))](
                *(self._logits_RV, self.max_R, factor_R.contiguous(), scaled_factor_R.contiguous()),
                *(vocabulary, self._logits_RV.stride(0), self._temperature, BLOCK),
            )


@triton.jit  # type: ignore[untyped-decorator]
def _read_rows(
    logits: tl.tensor, tail_max: tl.tensor, sumexp: tl.tensor, scaled_sumexp: tl.tensor,
    vocabulary: tl.tensor, stride: tl.tensor,
    TEMPERATURE: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """Online softmax (Milakov & Gimelshein 2018), a program per row: max, sums of exp(z - max), exp((z - max) / T)."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = logits.dtype.element_ty
    max_ = tl.full((), float("-inf"), dtype)
    sum_ = tl.full((), 0.0, dtype)
    scaled_sum_ = tl.full((), 0.0, dtype)
    for first in range(0, vocabulary, SIZE):
        at = first + tl.arange(0, SIZE)
        z = tl.load(logits + row * stride + at, mask=at < vocabulary, other=float("-inf"))
        new_max = tl.maximum(max_, tl.max(z, axis=0))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)  # only kept ids so far: -inf - -inf would be nan
        sum_ = sum_ * tl.exp(max_ - base) + tl.sum(tl.exp(z - base), axis=0)
        if TEMPERATURE != 1.0:
            rescaled = scaled_sum_ * tl.exp((max_ - base) / TEMPERATURE)
            scaled_sum_ = rescaled + tl.sum(tl.exp((z - base) / TEMPERATURE), axis=0)
        max_ = new_max
    tl.store(tail_max + row, max_)
    tl.store(sumexp + row, sum_)
    tl.store(scaled_sumexp + row, scaled_sum_)


@triton.jit  # type: ignore[untyped-decorator]
def _write_rows(
    logits: tl.tensor, maximum: tl.tensor, factor: tl.tensor, scaled_factor: tl.tensor,
    vocabulary: tl.tensor, stride: tl.tensor,
    TEMPERATURE: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """One program per block: z = factor * exp(z - max), plus scaled_factor * exp((z - max) / T) where T is not 1."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < vocabulary
    z = tl.load(logits + row * stride + at, mask=inside, other=float("-inf")) - tl.load(maximum + row)
    value = tl.load(factor + row) * tl.exp(z)
    if TEMPERATURE != 1.0:
        value += tl.load(scaled_factor + row) * tl.exp(z / TEMPERATURE)
    tl.store(logits + row * stride + at, value, mask=inside)
