"""What a teacher said about some rows, while it is on the device: the form that every way of reducing logits gives."""

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


def concatenate(parts: list[RowSignals]) -> RowSignals:
    """The rows of all parts, in order. At least one part."""
    if len(parts) == 1:
        return parts[0]
    columns: dict[str, Any] = {}
    for name in (f.name for f in fields(RowSignals)):
        pieces = [getattr(part, name) for part in parts]
        columns[name] = None if pieces[0] is None else torch.cat(pieces)
    return RowSignals(**columns)
