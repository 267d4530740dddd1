"""From cached rows to packed micro-batches: tensors that lie end to end, with every sequence's borders kept.

N tokens of a micro-batch, T = N minus one per sequence: the last token of a sequence has no successor, so no row is
predicted there, and no row ever looks into the next sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.cache.format.schema import ShardSpec
from pipeline.cache.format.temperature import partition_at
from pipeline.config import FusionSpec
from pipeline.contracts import Bf16Array, ScoredSequence, Signals
from pipeline.errors import AdmissionError
from student.data.fusion import fuse
from student.data.targets import Targets


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass reads."""

    number: int | None
    """Which of the step's micro-batches; None for an empty pass, in which no row counts."""
    seed: int
    """The step's: a pure function of the recipe's seed and the step, for whatever is random in it."""
    sequence_ids: tuple[str, ...]
    rows: tuple[int, ...]
    """Signal rows of each sequence."""
    input_ids_N: Tensor
    """int64, the sequences end to end."""
    position_ids_N: Tensor
    """int64, from 0 again with every sequence."""
    row_T: Tensor
    """int64: the places among N that predict a token of the same sequence."""
    targets: Targets
    hidden_TLE: Tensor | None
    """bfloat16: the teacher's states, where they are asked for."""

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.input_ids_N.device

    @property
    def tokens(self) -> int:
        """N, or 0 for an empty pass."""
        return 0 if self.number is None else len(self.input_ids_N)

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on another device."""
        return replace(
            self,
            input_ids_N=self.input_ids_N.to(device),
            position_ids_N=self.position_ids_N.to(device),
            row_T=self.row_T.to(device),
            targets=self.targets.to(device),
            hidden_TLE=None if self.hidden_TLE is None else self.hidden_TLE.to(device),
        )


@dataclass(frozen=True, slots=True)
class CollateSpec:
    """What of the caches' rows becomes tensors."""

    shards: Mapping[str, ShardSpec]
    """By teacher's name, in the order in which `collate` is given their rows."""
    temperature: float = 1.0
    """Of the output loss."""
    entries: bool = True
    """False for a control: it sees no teacher, its targets have K = 0."""
    hidden: bool = False
    """Whether the first teacher's states are read too."""
    vocabulary: int | None = None
    """The student's: an id beyond it is refused."""
    fusion: FusionSpec = field(default_factory=FusionSpec)


RowsByTeacher = Sequence[ScoredSequence]
"""One sequence as each teacher's cache has it."""


def collate(sequences: Sequence[RowsByTeacher], spec: CollateSpec, *, number: int | None, seed: int) -> MicroBatch:
    """One micro-batch out of whole sequences. Raises AdmissionError for an id that the student does not have."""
    rows = [views[0] for views in sequences]
    lengths = [len(row.sequence.input_ids_N) for row in rows]
    ids_N = np.concatenate([row.sequence.input_ids_N for row in rows]).astype(np.int64)
    hidden = [row.signals.hidden_TLD for row in rows] if spec.hidden else []
    return MicroBatch(
        number=number,
        seed=seed,
        sequence_ids=tuple(row.sequence.sequence_id for row in rows),
        rows=tuple(length - 1 for length in lengths),
        input_ids_N=torch.from_numpy(ids_N),
        position_ids_N=torch.cat([torch.arange(length) for length in lengths]),
        row_T=torch.from_numpy(np.delete(np.arange(len(ids_N)), np.cumsum(lengths) - 1)),
        targets=_fused(sequences, spec, counts=number is not None),
        hidden_TLE=from_bfloat16(np.concatenate([h for h in hidden if h is not None])) if hidden else None,
    )


def _fused(sequences: Sequence[RowsByTeacher], spec: CollateSpec, *, counts: bool) -> Targets:
    if not spec.entries or len(spec.shards) == 1:
        shard = next(iter(spec.shards.values()))
        return _targets([views[0] for views in sequences], shard, spec, counts=counts)
    by_teacher = {
        name: _targets([views[at] for views in sequences], shard, spec, counts=counts).at_temperature(spec.temperature)
        for at, (name, shard) in enumerate(spec.shards.items())
    }
    domains = [views[0].sequence.domain for views in sequences for _ in views[0].sequence.input_ids_N[1:]]
    return fuse(by_teacher, spec.fusion, domains)


def _targets(rows: RowsByTeacher, shard: ShardSpec, spec: CollateSpec, *, counts: bool) -> Targets:
    signals = [row.signals for row in rows]
    label_T = np.concatenate([row.sequence.input_ids_N[1:] for row in rows])
    mask_T = np.concatenate([row.sequence.loss_mask_N[1:] for row in rows]).astype(np.float32)
    id_TK, logweight_TK = _entries(signals, spec)
    _check_ids(rows, id_TK, label_T, spec.vocabulary)
    warm = spec.entries and spec.temperature != 1.0
    return Targets(
        label_T=torch.from_numpy(label_T.astype(np.int64)),
        weight_T=torch.from_numpy(mask_T if counts else np.zeros_like(mask_T)),
        entry_id_TK=torch.from_numpy(id_TK.astype(np.int64)),
        entry_logweight_TK=torch.from_numpy(logweight_TK),
        tail_logmass_T=_joined([s.tail_logmass_T for s in signals]),
        teacher_label_logprob_T=_joined([s.label_logprob_T for s in signals]),
        teacher_entropy_T=_joined([s.entropy_T for s in signals]),
        log_partition_T=_joined([_log_partition(s, shard, spec.temperature) for s in signals]) if warm else None,
        mode=shard.capture.mode,
    )


def _log_partition(signals: Signals, shard: ShardSpec, temperature: float) -> NDArray[np.float32]:
    """As captured, or rebuilt from the tail's scalars."""
    if temperature in shard.capture.temperatures:
        return signals.log_partition_TC[:, shard.capture.temperatures.index(temperature)]
    return partition_at(signals, shard.vocabulary, temperature)[1]


def _entries(signals: Sequence[Signals], spec: CollateSpec) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    width = max(s.entry_id_TK.shape[1] for s in signals) if spec.entries else 0
    ids, logweights = [], []
    for s in signals:
        missing = max(0, width - s.entry_id_TK.shape[1])
        ids.append(np.pad(s.entry_id_TK[:, :width], ((0, 0), (0, missing))))
        padded_TK = np.pad(s.entry_logweight_TK[:, :width], ((0, 0), (0, missing)), constant_values=-np.inf)
        logweights.append(padded_TK)
    return np.concatenate(ids), np.concatenate(logweights).astype(np.float32)


def _check_ids(
    rows: Sequence[ScoredSequence], id_TK: NDArray[np.int32], label_T: NDArray[np.int32], vocabulary: int | None
) -> None:
    largest = max(int(id_TK.max(initial=0)), int(label_T.max(initial=0)))
    if vocabulary is not None and largest >= vocabulary:
        ids = ", ".join(row.sequence.sequence_id for row in rows)
        raise AdmissionError(
            f"sequences {ids}: expected token ids below the student's vocabulary {vocabulary}, got {largest}"
        )


def _joined(parts: Sequence[NDArray[np.float32]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


def from_bfloat16(bits: Bf16Array) -> Tensor:
    """bfloat16 values out of their bits."""
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
