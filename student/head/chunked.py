"""The chunked student head: loss and gradient of the output distributions, without a [T, V] tensor.

Rows go through in chunks. A chunk makes its logits once, turns them in place into exponentials, reads off what the
losses need (log-sum-exp, the kept ids, the label, the mass of the rest), and turns the same buffer into the gradient
of the logits, which two matrix products carry on to the hidden states and the weight. So the gradient is formed in
the forward pass: three products a chunk like any dense head, one [R, V] buffer, and the gradient of the weight.

Notation: z logits, q = softmax(z), K kept ids, Q_r = sum of q outside K, L a row's loss as a function of the student's
log-probabilities x_i = log q_i (i in K) and r = log Q_r. With g_i = dL/dx_i, g_r = dL/dr and G = sum_i g_i + g_r:

    dL/dz_j = q_j (g_r / Q_r - G)   for j outside K,        g_j - q_j G   for j in K

and cross-entropy with label y adds q_j - [j = y]. Q_r is summed over the ids outside K, never 1 - sum: that difference
is rounding noise once the kept ids hold nearly everything.
"""

from dataclasses import dataclass, field, replace
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.config.training import DistributionSpec
from student.data.targets import Targets
from student.head.chunk import ChunkRows, EagerLogitsKernel, MakeLogitsKernel, RowLoss, loss_and_dlogits_, project_
from student.losses.registry import output_loss, prepared


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """What is computed from the logits, and how much each part counts."""

    kd: float = 1.0
    """Coefficient of the output loss. 0: it is not computed, and targets may have K = 0."""
    ce: float = 0.0
    """Coefficient of the label's cross-entropy (always at temperature 1)."""
    distribution: DistributionSpec = field(default_factory=DistributionSpec)
    """Its weights as numbers: schedules are settled before (`student.losses.registry.settled`)."""
    kernel: Literal["auto", "eager", "triton"] = "auto"
    """`auto`: Triton on a GPU where it is installed, plain torch elsewhere. `triton` on a CPU needs its interpreter."""
    scale: float = 1.0
    """`logits = scale * (hidden @ weight.T + bias)`, where the student's architecture has one."""
    soft_cap: float | None = None
    """`logits = cap * tanh(logits / cap)` afterwards."""
    chunk_bytes: int | None = None
    """The chunks' rows are cut further so that one buffer of logits stays below this, but not below 16 rows.
    None: 128 MiB on a CPU, where larger products gain nothing, and 1 GiB elsewhere."""

    def rows_per_chunk(self, chunk_rows: int, vocabulary: int, like: Tensor) -> int:
        """Rows whose logits, of the dtype and on the device of `like`, exist at a time."""
        limit = self.chunk_bytes or (2**27 if like.device.type == "cpu" else 2**30)
        return min(chunk_rows, max(16, limit // (vocabulary * like.element_size())))


@dataclass(frozen=True, slots=True)
class HeadLoss:
    """What one micro-batch adds up to. Divide by the global sum of weights for a mean."""

    total: Tensor
    """Scalar with gradient: sum over rows of weight * (kd * T^2 * KD + ce * CE)."""
    parts: dict[str, Tensor]
    """Scalars without gradient: `kd` and `ce`, sums over rows of weight times the bare loss, without coefficient."""
    weight_sum: Tensor
    """Scalar: sum of the rows' weights."""


def head_loss(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets: Targets, spec: HeadSpec, chunk_rows: int
) -> HeadLoss:
    """Sums of the output loss and the label's cross-entropy over T rows, in one pass over chunks of rows.

    Rows of weight 0 cost nothing. Gradients reach `hidden_TD`, `weight_VD` and `bias_V`; the backward pass may run
    once. Matrix products run in the dtype of `hidden_TD`, everything between them in float32 (float64 for float64
    input). Raises RecipeError where the targets cannot support the loss or the temperature.
    """
    return run_in_chunks(hidden_TD, weight_VD, bias_V, _BucketPass.of(targets, spec), chunk_rows)


class ChunkPass(Protocol):
    """What one call compares the student's logits with, chunk by chunk."""

    @property
    def targets(self) -> Targets:
        """Labels and weights."""
        ...

    @property
    def spec(self) -> HeadSpec:
        """Coefficients, and the architecture's scale and cap."""
        ...

    def loss_and_dlogits_(self, logits_RV: Tensor, index_R: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        """Weighted sums (KD, CE) of the rows at `index_R`; with `gradient`, `logits_RV` becomes that of the total."""
        ...


def run_in_chunks(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, pass_: ChunkPass, chunk_rows: int
) -> HeadLoss:
    """Take `pass_` over all rows that count; see `head_loss`."""
    total, kd, ce = _ChunkedHead.apply(hidden_TD, weight_VD, bias_V, pass_, chunk_rows)  # type: ignore[no-untyped-call]
    return HeadLoss(total, {"kd": kd, "ce": ce}, pass_.targets.weight_T.sum())


def kd_coefficient(spec: HeadSpec) -> float:
    """kd * T^2: the square keeps the size of the gradient when the temperature T moves (Hinton et al. 2015)."""
    return spec.kd * spec.distribution.temperature**2


@dataclass(frozen=True, slots=True)
class _BucketPass:
    """Kept entries and a tail: targets at the training temperature, and the loss as a function."""

    targets: Targets
    spec: HeadSpec
    loss: RowLoss | None

    @staticmethod
    def of(targets: Targets, spec: HeadSpec) -> "_BucketPass":
        if spec.kd == 0.0:
            return _BucketPass(targets, spec, None)
        loss = output_loss(spec.distribution, targets.mode)
        targets = targets.at_temperature(spec.distribution.temperature)
        return _BucketPass(prepared(targets, spec.distribution), spec, loss)

    def loss_and_dlogits_(self, logits_RV: Tensor, index_R: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        at, dtype = self.targets.rows_at(index_R), logits_RV.dtype
        rows = ChunkRows.of(
            at.label_T,
            at.weight_T.to(dtype),
            at.output_weight.to(dtype),
            at.entry_id_TK,
            at.entry_logweight_TK.to(dtype),
            at.tail_logmass_T.to(dtype),
        )
        rows = replace(rows, ce_grad_scale=self.spec.ce, kd_grad_scale=kd_coefficient(self.spec))
        sweep = logits_kernel_for(logits_RV.device, self.spec.kernel)
        return loss_and_dlogits_(logits_RV, rows, self.loss, self.spec.distribution.temperature, gradient, sweep)


def logits_kernel_for(device: torch.device, kernel: Literal["auto", "eager", "triton"]) -> MakeLogitsKernel:
    """How a chunk's logits are gone through: fused, or in plain torch."""
    if kernel == "triton" or (kernel == "auto" and device.type == "cuda" and _triton_is_installed()):
        from student.head.triton_kernel import TritonLogitsKernel

        return TritonLogitsKernel
    return EagerLogitsKernel


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


class _ChunkedHead(torch.autograd.Function):
    """Differentiates while it goes forward; the backward pass only scales."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, pass_: ChunkPass, chunk_rows: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden_TD.device.type, enabled=False):
            sums = _GradientAccumulator(hidden_TD, weight_VD, bias_V, ctx.needs_input_grad)
            sums.walk(pass_, chunk_rows)
        ctx.save_for_backward(sums.d_hidden_TD, sums.d_weight_VD, sums.d_bias_V)
        ctx.dtypes = hidden_TD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        ctx.mark_non_differentiable(sums.kd, sums.ce)
        return kd_coefficient(pass_.spec) * sums.kd + pass_.spec.ce * sums.ce, sums.kd, sums.ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second buffer of the weight's size would double what the head keeps. Autograd itself refuses a
        # second backward pass over saved tensors that changed.
        scaled = (
            None if saved is None else saved.mul_(d_total).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None


class _GradientAccumulator:
    """What the chunks add up to: two losses, and the gradients that were asked for."""

    def __init__(self, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, needed: tuple[bool, ...]) -> None:
        self.hidden_TD = hidden_TD.detach()
        self.weight_VD = weight_VD.detach().to(hidden_TD.dtype)
        self.value_dtype = torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32
        self.bias_V = None if bias_V is None else bias_V.detach().to(self.value_dtype)
        self.kd, self.ce = (hidden_TD.new_zeros((), dtype=self.value_dtype) for _ in range(2))
        self.d_hidden_TD = torch.zeros_like(self.hidden_TD) if needed[0] else None
        self.d_weight_VD = torch.zeros_like(self.weight_VD, dtype=self.value_dtype) if needed[1] else None
        self.d_bias_V = torch.zeros_like(self.bias_V) if self.bias_V is not None and needed[2] else None

    def walk(self, pass_: ChunkPass, chunk_rows: int) -> None:
        """Go through the rows that count, chunk by chunk, with one buffer of logits."""
        index_T = pass_.targets.weight_T.nonzero().squeeze(1)
        vocabulary = self.weight_VD.shape[0]
        rows = pass_.spec.rows_per_chunk(chunk_rows, vocabulary, self.kd)
        buffer_RV = self.hidden_TD.new_empty((min(rows, len(index_T)), vocabulary), dtype=self.value_dtype)
        for start in range(0, len(index_T), rows):
            index_R = index_T[start : start + rows]
            self._add_chunk(pass_, index_R, buffer_RV[: len(index_R)])

    def _add_chunk(self, pass_: ChunkPass, index_R: Tensor, logits_RV: Tensor) -> None:
        hidden_RD, spec = self.hidden_TD[index_R], pass_.spec
        slope_RV = project_(hidden_RD, self.weight_VD, self.bias_V, spec.scale, spec.soft_cap, logits_RV)
        needed = any(d is not None for d in (self.d_hidden_TD, self.d_weight_VD, self.d_bias_V))
        kd, ce = pass_.loss_and_dlogits_(logits_RV, index_R, needed)
        self.kd += kd
        self.ce += ce
        if needed:
            if slope_RV is not None:
                logits_RV.mul_(slope_RV)
            self._carry_back(index_R, hidden_RD, logits_RV.mul_(spec.scale) if spec.scale != 1.0 else logits_RV)

    def _carry_back(self, index_R: Tensor, hidden_RD: Tensor, d_logits_RV: Tensor) -> None:
        """From the gradient of the logits to those of hidden states, weight and bias."""
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
