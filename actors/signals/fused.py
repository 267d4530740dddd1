"""`reduce` in kernels that read a row of logits once or twice and write none: Triton's on a GPU, numba's on a CPU.

The k best are looked for first and set to -inf while the sums are made, so that these are sums over the rest; what
the best add is a matter of K numbers a row. The chunk of logits is all the memory that this takes, whatever its dtype.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from actors.signals import sums
from actors.signals.doubtful import doubtful_rows, redo_doubtful
from actors.signals.entries import Entries, prefix
from actors.signals.rows import RowSignals
from pipeline.contracts import CaptureSpec, TargetMode


def is_fused(device: torch.device, dtype: torch.dtype, spec: CaptureSpec) -> bool:
    """Whether there are kernels for such logits: only for the modes that need no random numbers."""
    if spec.mode not in (TargetMode.TOPK, TargetMode.TOPP):
        return False
    if device.type == "cpu":
        return dtype in (torch.float32, torch.bfloat16) and find_spec("numba") is not None
    return device.type == "cuda" and find_spec("triton") is not None


def kernels(device: torch.device) -> ModuleType:
    """`best_ids` and `rest_sums` for that device."""
    if device.type == "cpu":
        from actors.signals import kernels_cpu

        return kernels_cpu
    from actors.signals import kernels_gpu

    return kernels_gpu


def fused_signals(logits_RV: Tensor, label_R: Tensor, spec: CaptureSpec, boundary_V: Tensor | None) -> RowSignals:
    """See `actors.signals.reduce.reduce_rows`; `topk` and `topp` alone. Logits are as they were when this returns."""
    boundary_V = None if boundary_V is None else boundary_V.to(logits_RV.device)
    dtype = torch.float64 if logits_RV.dtype is torch.float64 else torch.float32
    on_device = kernels(logits_RV.device)
    best_RK = on_device.best_ids(logits_RV, spec.k)
    logit_RK = logits_RV.gather(1, best_RK)
    peak_R = logit_RK[:, 0].to(dtype).contiguous()
    label_x_R = logits_RV.gather(1, label_R[:, None])[:, 0].to(dtype) - peak_R
    best = (torch.arange(len(best_RK), device=best_RK.device)[:, None], best_RK)
    logits_RV[best] = -torch.inf  # scatter_ would copy all of the logits on a CPU, if they are bfloat16
    rest_RA = on_device.rest_sums(logits_RV, peak_R, spec, boundary_V)
    logits_RV[best] = logit_RK
    row = _Row(rest_RA, best_RK, logit_RK.to(dtype) - peak_R[:, None])
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

    def __init__(self, rest_RA: Tensor, best_RK: Tensor, x_RK: Tensor) -> None:
        self._rest_RA, self._best_RK, self.x_RK, self._e_RK = rest_RA, best_RK, x_RK, x_RK.exp()
        self._total_R = rest_RA[:, sums.MASS] + self._e_RK.sum(1)
        self.log_total_R = self._total_R.log()

    def entropy(self) -> Tensor:
        """Nats; not finite where a best token cannot occur."""
        product_R = self._rest_RA[:, sums.PRODUCT] + (self._e_RK * self.x_RK).sum(1)
        return self.log_total_R - product_R / self._total_R

    def boundary(self, boundary_V: Tensor) -> Tensor:
        """Sum of e over the tokens that start a word."""
        best_R = torch.where(boundary_V[self._best_RK], self._e_RK, 0.0).sum(1)
        return self._rest_RA[:, sums.BOUNDARY] + best_R

    def log_partitions(self, temperatures: tuple[float, ...]) -> Tensor:
        """[R, C] log-partitions, 0 at temperature 1."""
        found_RC = self.log_total_R.new_zeros(len(self.log_total_R), len(temperatures))
        for number, temperature in enumerate(temperatures):
            if temperature != 1.0:
                best_R = (self.x_RK / temperature).exp().sum(1)
                sum_R = self._rest_RA[:, sums.POWERS + number] + best_R
                found_RC[:, number] = sum_R.log() - self.log_total_R / temperature
        return found_RC

    def tail(self, entries: Entries) -> _Tail:
        """The rest, and those of the best that are not kept."""
        left_RK = torch.isneginf(entries.logweight_RK) & (self._e_RK > 0)
        x_RK = torch.where(left_RK, self.x_RK, 0.0)
        e_RK, root_RK = (torch.where(left_RK, (x_RK * power).exp(), 0.0) for power in (1.0, 0.5))
        best = (values_RK.sum(1) for values_RK in (e_RK, e_RK * x_RK, root_RK, root_RK * x_RK))
        rest = (self._rest_RA[:, column] for column in (sums.MASS, sums.PRODUCT, sums.ROOT, sums.ROOT_PRODUCT))
        return _Tail(*(ours + others for ours, others in zip(rest, best, strict=True)))
