"""Signals of rows as tensors on the device: what every reduction of logits returns."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowSignals:
    """Signals of R rows, on the device that computed them. Fields as in `pipeline.contracts.Signals`."""

    entry_id_RK: Tensor
    entry_logweight_RK: Tensor
    tail_logmass_R: Tensor
    label_logprob_R: Tensor
    entropy_R: Tensor
    log_partition_RC: Tensor
    tail_shape_R3: Tensor | None
    boundary_logmass_R: Tensor | None

    def __getitem__(self, rows: slice) -> "RowSignals":
        return _by_column([self], lambda columns: columns[0][rows])


def concatenate(parts: list[RowSignals]) -> RowSignals:
    """Concatenate the rows of at least one part, in order."""
    return parts[0] if len(parts) == 1 else _by_column(parts, torch.cat)


def _by_column(parts: list[RowSignals], combine: Callable[[list[Tensor]], Tensor]) -> RowSignals:
    columns: dict[str, Any] = {}
    for name in (f.name for f in fields(RowSignals)):
        tensors = [getattr(part, name) for part in parts]
        columns[name] = None if tensors[0] is None else combine(tensors)
    return RowSignals(**columns)
