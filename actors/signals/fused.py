"""`reduce_rows` with fused kernels, Triton on a GPU and numba on a CPU: each logit is read once or twice.

The k largest logits are found first and set to -inf while the kernel sums over the rest of the row; their own terms are
then added from K numbers a row. No copy of the logits is made, whatever their dtype.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from actors.signals import sums
from actors.signals.entries import Entries, prefix_entries
from actors.signals.rows import RowSignals
from actors.signals.underflow import recompute_rows, rows_to_recompute
from pipeline.contracts import CaptureSpec, TargetMode


def is_fused(device: torch.device, dtype: torch.dtype, spec: CaptureSpec) -> bool:
    """Return whether kernels exist for the mode (`topk`, `topp`), device and dtype, and their library is installed."""
    if spec.mode not in (TargetMode.TOPK, TargetMode.TOPP):
        return False
    if device.type == "cpu":
        return dtype in (torch.float32, torch.bfloat16) and find_spec("numba") is not None
    return device.type == "cuda" and find_spec("triton") is not None


def kernels(device: torch.device) -> ModuleType:
    """Return the module with `best_ids` and `rest_sums` for the device."""
    if device.type == "cpu":
        from actors.signals import kernels_cpu

        return kernels_cpu
    from actors.signals import kernels_gpu

    return kernels_gpu


def fused_signals(logits_RV: Tensor, label_R: Tensor, spec: CaptureSpec, boundary_V: Tensor | None) -> RowSignals:
    """Reduce as `reduce_rows` does, for `topk` and `topp`. Logits are modified meanwhile and restored."""
    boundary_V = None if boundary_V is None else boundary_V.to(logits_RV.device)
    dtype = torch.float64 if logits_RV.dtype is torch.float64 else torch.float32
    kernel = kernels(logits_RV.device)
    best_RK = kernel.best_ids(logits_RV, spec.k)
    logit_RK = logits_RV.gather(1, best_RK)
    peak_R = logit_RK[:, 0].to(dtype).contiguous()
    label_x_R = logits_RV.gather(1, label_R[:, None])[:, 0].to(dtype) - peak_R
    best = (torch.arange(len(best_RK), device=best_RK.device)[:, None], best_RK)
    logits_RV[best] = -torch.inf  # on a CPU, scatter_ copies bfloat16 logits
    rest_RA = kernel.rest_sums(logits_RV, peak_R, spec, boundary_V)
    logits_RV[best] = logit_RK
    total = _Sums(rest_RA, best_RK, logit_RK.to(dtype) - peak_R[:, None])
    entries = prefix_entries(best_RK, total.x_RK - total.log_total_R[:, None], spec)
    tail = total.tail(entries)
    boundary_R = None if boundary_V is None else total.boundary(boundary_V)
    signals = RowSignals(
        entry_id_RK=entries.id_RK.int(),
        entry_logweight_RK=entries.logweight_RK.float(),
        tail_logmass_R=tail.mass_R.log() - total.log_total_R,
        label_logprob_R=label_x_R - total.log_total_R,
        entropy_R=total.entropy(),
        log_partition_RC=total.log_partitions(spec.temperatures),
        tail_shape_R3=tail.shape(total.log_total_R) if spec.any_temperature else None,
        boundary_logmass_R=None if boundary_R is None else boundary_R.log() - total.log_total_R,
    )
    redo_R = rows_to_recompute(tail.mass_R, signals.entropy_R, boundary_R)
    if bool(redo_R.any()):
        recompute_rows(signals, logits_RV, entries, boundary_V, redo_R)
    return signals


@dataclass(frozen=True, slots=True)
class _Tail:
    """Sums over the tokens that are not kept: of e, e x, sqrt(e), sqrt(e) x."""

    mass_R: Tensor
    product_R: Tensor
    root_R: Tensor
    root_product_R: Tensor

    def shape(self, log_total_R: Tensor) -> Tensor:
        """Return S(1/2), S'(1/2), S'(1) as `pipeline.contracts.Signals.tail_shape_T3` defines them."""
        half_R, one_R = self.root_product_R / self.root_R, self.product_R / self.mass_R
        parts = [self.root_R.log() - log_total_R / 2, half_R - log_total_R, one_R - log_total_R]
        return torch.stack(parts, dim=1)


class _Sums:
    """Sums over whole rows: the kernel's sums over the rest plus the terms of the k largest; x and e as in `sums`."""

    def __init__(self, rest_RA: Tensor, best_RK: Tensor, x_RK: Tensor) -> None:
        self._rest_RA, self._best_RK, self.x_RK, self._e_RK = rest_RA, best_RK, x_RK, x_RK.exp()
        self._total_R = rest_RA[:, sums.MASS] + self._e_RK.sum(1)
        self.log_total_R = self._total_R.log()

    def entropy(self) -> Tensor:
        """Return the entropy in nats; not finite if one of the k largest logits is -inf."""
        product_R = self._rest_RA[:, sums.PRODUCT] + (self._e_RK * self.x_RK).sum(1)
        return self.log_total_R - product_R / self._total_R

    def boundary(self, boundary_V: Tensor) -> Tensor:
        """Return the sum of e over the tokens that start a word."""
        best_R = torch.where(boundary_V[self._best_RK], self._e_RK, 0.0).sum(1)
        return self._rest_RA[:, sums.BOUNDARY] + best_R

    def log_partitions(self, temperatures: tuple[float, ...]) -> Tensor:
        """Return the [R, C] log-partitions, 0 at temperature 1."""
        partition_RC = self.log_total_R.new_zeros(len(self.log_total_R), len(temperatures))
        for number, temperature in enumerate(temperatures):
            if temperature != 1.0:
                best_R = (self.x_RK / temperature).exp().sum(1)
                sum_R = self._rest_RA[:, sums.POWERS + number] + best_R
                partition_RC[:, number] = sum_R.log() - self.log_total_R / temperature
        return partition_RC

    def tail(self, entries: Entries) -> _Tail:
        """Return the tail's sums: the rest and those of the k largest that `topp` does not keep."""
        in_tail_RK = torch.isneginf(entries.logweight_RK) & (self._e_RK > 0)
        x_RK = torch.where(in_tail_RK, self.x_RK, 0.0)
        e_RK, root_RK = (torch.where(in_tail_RK, (x_RK * power).exp(), 0.0) for power in (1.0, 0.5))
        best = (values_RK.sum(1) for values_RK in (e_RK, e_RK * x_RK, root_RK, root_RK * x_RK))
        rest = (self._rest_RA[:, column] for column in (sums.MASS, sums.PRODUCT, sums.ROOT, sums.ROOT_PRODUCT))
        return _Tail(*(rest_R + best_R for rest_R, best_R in zip(rest, best, strict=True)))
