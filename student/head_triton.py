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


class TritonSweep:
    """See `student.head_chunk.Sweep`. Kept ids are set to -inf first, so that no kernel has to look for them."""

    def __init__(self, logits_CV: Tensor, id_CK: Tensor, temperature: float) -> None:
        self._logits_CV, self._temperature = logits_CV, temperature
        kept_CK = logits_CV.gather(1, id_CK)
        logits_CV.scatter_(1, id_CK, -torch.inf)
        top_C, hard_C, soft_C = (logits_CV.new_empty(len(logits_CV)) for _ in range(3))
        with torch.cuda.device_of(logits_CV):  # type: ignore[no-untyped-call]
            _read_rows[(len(logits_CV),)](
                *(logits_CV, top_C, hard_C, soft_C), *logits_CV.shape[1:], logits_CV.stride(0), temperature, BLOCK
            )
        self.peak_C = torch.cat([top_C[:, None], kept_CK], dim=1).amax(dim=1)
        below_C = top_C - self.peak_C
        self.hard_C = hard_C * below_C.exp()
        self.soft_C = self.hard_C if temperature == 1.0 else soft_C * (below_C / temperature).exp()

    def write_(self, hard_C: Tensor, soft_C: Tensor) -> None:
        """See `student.head_chunk.Sweep`."""
        rows, vocabulary = self._logits_CV.shape
        if self._temperature == 1.0:
            hard_C = hard_C + soft_C
        with torch.cuda.device_of(self._logits_CV):  # type: ignore[no-untyped-call]
            _write_rows[(rows, triton.cdiv(vocabulary, BLOCK))](
                *(self._logits_CV, self.peak_C, hard_C.contiguous(), soft_C.contiguous()),
                *(vocabulary, self._logits_CV.stride(0), self._temperature, BLOCK),
            )


@triton.jit  # type: ignore[untyped-decorator]
def _read_rows(
    logits: tl.tensor, top: tl.tensor, hard: tl.tensor, soft: tl.tensor, vocabulary: tl.tensor, stride: tl.tensor,
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
    tl.store(hard + row, hard_)
    tl.store(soft + row, soft_)


@triton.jit  # type: ignore[untyped-decorator]
def _write_rows(
    logits: tl.tensor, peak: tl.tensor, hard: tl.tensor, soft: tl.tensor, vocabulary: tl.tensor, stride: tl.tensor,
    TEMPERATURE: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """One program a block of a row: z becomes hard * exp(z - peak), with T other than 1 plus the soft share."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at < vocabulary
    z = tl.load(logits + row * stride + at, mask=inside, other=float("-inf")) - tl.load(peak + row)
    value = tl.load(hard + row) * tl.exp(z)
    if TEMPERATURE != 1.0:
        value += tl.load(soft + row) * tl.exp(z / TEMPERATURE)
    tl.store(logits + row * stride + at, value, mask=inside)
