"""The training targets of one packed micro-batch: teacher signals as tensors.

Rows and entries follow `pipeline.contracts`: entries by falling weight with distinct ids, padding last (id 0,
log-weight -inf), `tail_logmass_T` the log of the mass outside the entries.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.contracts import TargetMode
from pipeline.errors import RecipeError

BUCKET_MODES = frozenset({TargetMode.TOPK, TargetMode.TOPP})
"""Modes whose entries are the teacher's probabilities, with the rest as one bucket of known mass."""
LINEAR_MODES = frozenset({TargetMode.UNBIASED, TargetMode.SAMPLED})
"""Modes whose entries are an unbiased estimate of the teacher: only losses linear in the target may use them."""


@dataclass(frozen=True, slots=True)
class Targets:
    """T rows of one micro-batch, on the student's device."""

    label_T: Tensor
    """int64: the next token."""
    weight_T: Tensor
    """float32: weight of the row in every loss; 0 for padding and masked labels."""
    entry_id_TK: Tensor
    """int64. K is 0 for a control, which reads no teacher."""
    entry_logweight_TK: Tensor
    """float32, -inf in padding."""
    tail_logmass_T: Tensor
    """float32, -inf where the entries sum to 1."""
    teacher_label_logprob_T: Tensor
    """float32, at temperature 1."""
    teacher_entropy_T: Tensor
    """float32, nats, at temperature 1."""
    log_partition_T: Tensor | None
    """float32: log sum_v exp(log p_v / temperature) at the temperature of training; None at temperature 1."""
    mode: TargetMode
    kd_weight_T: Tensor | None = None
    """float32: factor on `weight_T` in the output loss alone, set by token selection; None is 1 everywhere."""
    temperature: float = 1.0
    """Temperature of entries and tail; see `at_temperature`."""

    @property
    def rows(self) -> int:
        """T."""
        return self.label_T.shape[0]

    @property
    def output_weight(self) -> Tensor:
        """float32 [T]: weight of each row in the output loss."""
        return self.weight_T if self.kd_weight_T is None else self.weight_T * self.kd_weight_T

    def to(self, device: torch.device | str) -> "Targets":
        """Return a copy on another device."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def rows_at(self, index: Tensor) -> "Targets":
        """Return the rows at `index` (int64), in its order."""
        return self._each(lambda value: value[index])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Targets":
        values = {name: getattr(self, name) for name in self.__slots__}
        changed: dict[str, Any] = {n: change(v) for n, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changed)

    def at_temperature(self, temperature: float) -> "Targets":
        """Return the targets at softmax temperature t: log p_t(i) = log p(i) / t - S_t, with S_t the log-partition.

        Raises RecipeError for modes sampled at temperature 1, and if `log_partition_T` is missing.
        """
        if temperature == self.temperature:
            return self
        if self.mode in LINEAR_MODES or self.temperature != 1.0 or self.log_partition_T is None:
            raise RecipeError(
                f"training.distribution.temperature: got {temperature:g}, but these `{self.mode}` targets are at "
                f"{self.temperature:g} without a log-partition for it; capture topk or topp with "
                f"capture.temperatures=[1.0, {temperature:g}]"
            )
        entry_logweight_TK = self.entry_logweight_TK / temperature - self.log_partition_T[:, None]
        tail_logmass_T = _complement(torch.logsumexp(entry_logweight_TK, dim=1))
        return replace(
            self, entry_logweight_TK=entry_logweight_TK, tail_logmass_T=tail_logmass_T, temperature=temperature
        )


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x <= 0 without cancellation (Maechler 2012); -inf at 0."""
    near_zero = x > -math.log(2.0)
    return torch.where(near_zero, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def _complement(logmass_T: Tensor) -> Tensor:
    """Log of (1 - mass); -inf where rounding by a codec left a mass slightly above 1."""
    return log1mexp(logmass_T.double().clamp_max(0.0)).to(logmass_T.dtype)
