"""The two passes over a chunk's logits as Triton kernels: one read, then one read and one write, and no other buffer.

Compiled for a GPU, and run in Triton's interpreter on a CPU by the tests of the head (test_head_triton.py). No GPU was
at hand to run it on: no time and no memory is claimed for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits that one program holds at a time."""


class TritonLogitsKernel:
    """See `student.head.chunk.Sweep`. Kept ids are set to -inf first, so that no kernel has to look for them."""

    def __init__(self, logits_RV: Tensor, id_RK: Tensor, temperature: float) -> None:
        self._logits_RV, self._temperature = logits_RV, temperature
        kept_RK = logits_RV.gather(1, id_RK)
        logits_RV.scatter_(1, id_RK, -torch.inf)
        top_R, sumexp_R, sumexp_at_T_R = (logits_RV.new_empty(len(logits_RV)) for _ in range(3))
        with torch.cuda.device_of(logits_RV):  # type: ignore[no-untyped-call]
            _read_rows[(len(logits_RV),)](
                *(logits_RV, top_R, sumexp_R, sumexp_at_T_R),
                *logits_RV.shape[1:],
                logits_RV.stride(0),
                temperature,
                BLOCK,
            )
        self.peak_R = torch.cat([top_R[:, None], kept_RK], dim=1).amax(dim=1)
        below_R = top_R - self.peak_R
        self.sumexp_R = sumexp_R * below_R.exp()
        self.sumexp_at_T_R = self.sumexp_R if temperature == 1.0 else sumexp_at_T_R * (below_R / temperature).exp()

    def write_(self, sumexp_R: Tensor, sumexp_at_T_R: Tensor) -> None:
        """See `student.head.chunk.Sweep`."""
        rows, vocabulary = self._logits_RV.shape
        if self._temperature == 1.0:
            sumexp_R = sumexp_R + sumexp_at_T_R
        with torch.cuda.device_of(self._logits_RV):  # type: ignore[no-untyped-call]
            _write_rows[(rows, triton.cdiv(vocabulary, BLOCK))](
                *(self._logits_RV, self.peak_R, sumexp_R.contiguous(), sumexp_at_T_R.contiguous()),
                *(vocabulary, self._logits_RV.stride(0), self._temperature, BLOCK),
            )


@triton.jit  # type: ignore[untyped-decorator]
def _read_rows(
    logits: tl.tensor, top: tl.tensor, sumexp: tl.tensor, sumexp_at_T: tl.tensor,
    vocabulary: tl.tensor, stride: tl.tensor,
    TEMPERATURE: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """One program a row: its maximum, and the sums of exp(z - max) and exp((z - max) / T), rescaled as max rises."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = logits.dtype.element_ty
    top_ = tl.full((), float("-inf"), dtype)
    hard_ = tl.full((), 0.0, dtype)
    soft_ = tl.full((), 0.0, dtype)
    for first in range(0, vocabulary, SIZE):
        at = first + tl.arange(0, SIZE)
        z = tl.load(logits + row * stride + at, mask=at < vocabulary, other=float("-inf"))
        higher = tl.maximum(top_, tl.max(z, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but kept ids so far: inf - inf is nan
        hard_ = hard_ * tl.exp(top_ - base) + tl.sum(tl.exp(z - base), axis=0)
        if TEMPERATURE != 1.0:
            soft_ = soft_ * tl.exp((top_ - base) / TEMPERATURE) + tl.sum(tl.exp((z - base) / TEMPERATURE), axis=0)
        top_ = higher
    tl.store(top + row, top_)
    tl.store(sumexp + row, hard_)
    tl.store(sumexp_at_T + row, soft_)


@triton.jit  # type: ignore[untyped-decorator]
def _write_rows(
    logits: tl.tensor, peak: tl.tensor, sumexp: tl.tensor, sumexp_at_T: tl.tensor,
    vocabulary: tl.tensor, stride: tl.tensor,
    TEMPERATURE: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """One program a block of a row: z becomes hard * exp(z - peak), with T other than 1 plus the soft share."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < vocabulary
    z = tl.load(logits + row * stride + at, mask=inside, other=float("-inf")) - tl.load(peak + row)
    value = tl.load(sumexp + row) * tl.exp(z)
    if TEMPERATURE != 1.0:
        value += tl.load(sumexp_at_T + row) * tl.exp(z / TEMPERATURE)
    tl.store(logits + row * stride + at, value, mask=inside)
