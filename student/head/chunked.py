"""Chunked LM head: distillation loss, cross-entropy and their gradients without a [T, V] tensor.

The method of Liger-Kernel's fused linear losses, for targets of kept entries and a tail: rows are processed in chunks,
and the gradient is computed in the forward pass. A chunk computes its logits once, takes from them what the losses need
(log-sum-exp, kept ids, label, mass of the tail) and overwrites them with their gradient. Two matrix products then give
the gradients of hidden states and weight. Memory: one [R, V] buffer and the gradient of the weight.

Notation: z logits, q = softmax(z), K kept ids, Q_r = sum of q outside K, L a row's loss as a function of the student's
log-probabilities x_i = log q_i (i in K) and r = log Q_r. With g_i = dL/dx_i, g_r = dL/dr and G = sum_i g_i + g_r:

    dL/dz_j = q_j (g_r / Q_r - G)   for j outside K,        g_j - q_j G   for j in K

and cross-entropy with label y adds q_j - [j = y]. Q_r is summed over the ids outside K: computed as 1 - sum over K, it
would be rounding error wherever the kept ids have nearly all the mass.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.config.training import DistributionSpec
from student.data.targets import Targets
from student.head.chunk import ChunkRows, EagerLogitsKernel, MakeLogitsKernel, RowLoss, loss_and_dlogits_, write_logits_
from student.losses.registry import distillation_loss_fn, prepare_targets


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """Losses of the LM head with their coefficients, the model's logit transform, and the chunk size."""

    kd: float = 1.0
    """Coefficient of the distillation loss. 0: it is not computed, and targets may have K = 0."""
    ce: float = 0.0
    """Coefficient of the cross-entropy with the label (always at temperature 1)."""
    distribution: DistributionSpec = field(default_factory=DistributionSpec)
    """Weights as numbers: `student.losses.registry.resolve_schedules` comes first."""
    kernel: Literal["auto", "eager", "triton"] = "auto"
    """`auto`: Triton on a GPU where it is installed, plain torch elsewhere. `triton` on a CPU needs its interpreter."""
    scale: float = 1.0
    """`logits = scale * (hidden @ weight.T + bias)`."""
    soft_cap: float | None = None
    """`logits = cap * tanh(logits / cap)` afterwards."""
    chunk_bytes: int | None = None
    """Most bytes of a chunk's logits, though a chunk may always have 16 rows. None: 128 MiB on a CPU, where larger
    matrix products are no faster, and 1 GiB elsewhere."""

    def rows_per_chunk(self, chunk_rows: int, vocabulary: int, like: Tensor) -> int:
        """R: at most `chunk_rows`, cut to `chunk_bytes` for logits with the dtype and device of `like`."""
        limit = self.chunk_bytes or (2**27 if like.device.type == "cpu" else 2**30)
        return min(chunk_rows, max(16, limit // (vocabulary * like.element_size())))


@dataclass(frozen=True, slots=True)
class HeadLoss:
    """Sums over the rows of a micro-batch. The mean is their quotient by the global sum of weights."""

    total: Tensor
    """Scalar with gradient: sum over rows of weight * (kd * T^2 * KD + ce * CE), T the temperature."""
    parts: dict[str, Tensor]
    """Scalars without gradient: `kd` and `ce`, sums over rows of weight * KD and weight * CE."""


def head_loss(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets: Targets, spec: HeadSpec, chunk_rows: int
) -> HeadLoss:
    """Sum the distillation loss and the cross-entropy over T rows, chunk by chunk.

    Rows of weight 0 are skipped. Differentiable once by `hidden_TD`, `weight_VD` and `bias_V`. Matrix products run in
    the dtype of `hidden_TD`, everything between them in float32 (float64 for float64 input). Raises RecipeError where
    the targets do not support the loss or the temperature.
    """
    return fused_linear_loss(hidden_TD, weight_VD, bias_V, _EntriesLoss.of(targets, spec), chunk_rows)


@dataclass(frozen=True, slots=True)
class ChunkLoss(ABC):
    """A loss of the student's logits that is computed chunk by chunk."""

    targets: Targets
    spec: HeadSpec

    @abstractmethod
    def loss_and_dlogits_(self, logits_RV: Tensor, index_R: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        """Weighted sums (KD, CE) of the rows at `index_R`; `logits_RV` becomes the total's gradient, if `gradient`."""


def fused_linear_loss(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, loss: ChunkLoss, chunk_rows: int
) -> HeadLoss:
    """Compute `loss` over all rows of nonzero weight; see `head_loss`."""
    total, kd, ce = _FusedLinearLoss.apply(hidden_TD, weight_VD, bias_V, loss, chunk_rows)  # type: ignore[no-untyped-call]
    return HeadLoss(total, {"kd": kd, "ce": ce})


def kd_coefficient(spec: HeadSpec) -> float:
    """kd * T^2: the gradient keeps its size when the temperature T changes (Hinton et al. 2015)."""
    return spec.kd * spec.distribution.temperature**2


@dataclass(frozen=True, slots=True)
class _EntriesLoss(ChunkLoss):
    """Loss against kept entries and a tail, both at the training temperature."""

    loss: RowLoss | None

    @staticmethod
    def of(targets: Targets, spec: HeadSpec) -> "_EntriesLoss":
        if spec.kd == 0.0:
            return _EntriesLoss(targets, spec, None)
        loss = distillation_loss_fn(spec.distribution, targets.mode)
        targets = targets.at_temperature(spec.distribution.temperature)
        return _EntriesLoss(prepare_targets(targets, spec.distribution), spec, loss)

    def loss_and_dlogits_(self, logits_RV: Tensor, index_R: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        targets, spec = self.targets.rows_at(index_R), self.spec
        rows = ChunkRows.of(targets, spec.ce, kd_coefficient(spec), logits_RV.dtype)
        make_kernel = logits_kernel_for(logits_RV.device, spec.kernel)
        return loss_and_dlogits_(logits_RV, rows, self.loss, spec.distribution.temperature, gradient, make_kernel)


def logits_kernel_for(device: torch.device, kernel: Literal["auto", "eager", "triton"]) -> MakeLogitsKernel:
    """The implementation of `LogitsKernel` for a device and the recipe's choice."""
    if kernel == "triton" or (kernel == "auto" and device.type == "cuda" and _triton_is_installed()):
        from student.head.triton_kernel import TritonLogitsKernel

        return TritonLogitsKernel
    return EagerLogitsKernel


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


class _FusedLinearLoss(torch.autograd.Function):
    """Computes the gradients in the forward pass; the backward pass multiplies them by that of the total."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, loss: ChunkLoss, chunk_rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden_TD.device.type, enabled=False):
            sums = _GradientAccumulator(hidden_TD, weight_VD, bias_V, ctx.needs_input_grad)
            sums.accumulate(loss, chunk_rows)
        ctx.save_for_backward(sums.d_hidden_TD, sums.d_weight_VD, sums.d_bias_V)
        ctx.dtypes = hidden_TD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        ctx.mark_non_differentiable(sums.kd, sums.ce)
        return kd_coefficient(loss.spec) * sums.kd + loss.spec.ce * sums.ce, sums.kd, sums.ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place, which saves a buffer of the weight's size. Autograd raises at a second backward pass, since the
        # saved tensors have changed.
        scaled = (
            None if saved is None else saved.mul_(d_total).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None


class _GradientAccumulator:
    """Sums over chunks: two losses, and the gradients of the inputs that need one."""

    def __init__(
        self, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, needs_grad: tuple[bool, ...]
    ) -> None:
        self.hidden_TD = hidden_TD.detach()
        self.weight_VD = weight_VD.detach().to(hidden_TD.dtype)
        self.value_dtype = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        self.bias_V = None if bias_V is None else bias_V.detach().to(self.value_dtype)
        self.kd, self.ce = (hidden_TD.new_zeros((), dtype=self.value_dtype) for _ in range(2))
        self.d_hidden_TD = torch.zeros_like(self.hidden_TD) if needs_grad[0] else None
        self.d_weight_VD = torch.zeros_like(self.weight_VD, dtype=self.value_dtype) if needs_grad[1] else None
        self.d_bias_V = torch.zeros_like(self.bias_V) if self.bias_V is not None and needs_grad[2] else None

    def accumulate(self, loss: ChunkLoss, chunk_rows: int) -> None:
        """Add all rows of nonzero weight, chunk by chunk, with one buffer of logits."""
        index_T = loss.targets.weight_T.nonzero().squeeze(1)
        vocabulary = self.weight_VD.shape[0]
        rows = loss.spec.rows_per_chunk(chunk_rows, vocabulary, self.kd)
        buffer_RV = self.hidden_TD.new_empty((min(rows, len(index_T)), vocabulary), dtype=self.value_dtype)
        for start in range(0, len(index_T), rows):
            index_R = index_T[start : start + rows]
            self._accumulate_chunk(loss, index_R, buffer_RV[: len(index_R)])

    def _accumulate_chunk(self, loss: ChunkLoss, index_R: Tensor, logits_RV: Tensor) -> None:
        hidden_RD, spec = self.hidden_TD[index_R], loss.spec
        derivative_RV = write_logits_(hidden_RD, self.weight_VD, self.bias_V, spec.scale, spec.soft_cap, logits_RV)
        gradient = any(d is not None for d in (self.d_hidden_TD, self.d_weight_VD, self.d_bias_V))
        kd, ce = loss.loss_and_dlogits_(logits_RV, index_R, gradient)
        self.kd += kd
        self.ce += ce
        if gradient:
            if derivative_RV is not None:
                logits_RV.mul_(derivative_RV)
            self._linear_backward(index_R, hidden_RD, logits_RV.mul_(spec.scale) if spec.scale != 1.0 else logits_RV)

    def _linear_backward(self, index_R: Tensor, hidden_RD: Tensor, d_logits_RV: Tensor) -> None:
        """Gradients of hidden states, weight and bias from that of the linear layer's output."""
        if self.d_bias_V is not None:
            self.d_bias_V += d_logits_RV.sum(dim=0)
        d_logits_RV = d_logits_RV.to(hidden_RD.dtype)
        if self.d_hidden_TD is not None:
            self.d_hidden_TD[index_R] = d_logits_RV @ self.weight_VD
        if self.d_weight_VD is not None:
            if self.d_weight_VD.dtype == hidden_RD.dtype:
                self.d_weight_VD.addmm_(d_logits_RV.t(), hidden_RD)
            else:
                self.d_weight_VD += d_logits_RV.t() @ hidden_RD
