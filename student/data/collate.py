"""The collate_fn of a training: cached sequences become one packed micro-batch of tensors.

Sequences are concatenated without padding, and `position_ids_N` restarts at 0 with each, as transformers expects of
packed (padding-free) batches. N tokens give T = N - (number of sequences) rows: the last token of a sequence predicts
nothing, so no row has a label in the next sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
    """The input of one forward pass."""

    number: int | None
    """Index within the step; None for an empty pass, whose rows all have weight 0."""
    seed: int
    """Of the step: a pure function of the recipe's seed and the step's number."""
    sequence_ids: tuple[str, ...]
    rows: tuple[int, ...]
    """Signal rows of each sequence."""
    input_ids_N: Tensor
    """int64: the sequences, concatenated."""
    position_ids_N: Tensor
    """int64: restarts at 0 with each sequence."""
    row_T: Tensor
    """int64: positions among N that predict a token of the same sequence."""
    targets: Targets
    hidden_TLE: Tensor | None
    """bfloat16: the first teacher's captured states; None without a feature or relation loss."""

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.input_ids_N.device

    @property
    def tokens(self) -> int:
        """N, or 0 for an empty pass."""
        return 0 if self.number is None else len(self.input_ids_N)

    def to(self, device: torch.device) -> "MicroBatch":
        """Return a copy on another device."""
        values = {name: getattr(self, name) for name in self.__slots__}
        moved: dict[str, Any] = {n: v.to(device) for n, v in values.items() if isinstance(v, Tensor | Targets)}
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class CollateSpec:
    """Settings of `collate`: which columns of the caches become tensors."""

    shards: Mapping[str, ShardSpec]
    """Shard schema by teacher's name, in the order of `RowsByTeacher`."""
    temperature: float = 1.0
    """Softmax temperature of the output loss."""
    entries: bool = True
    """Whether to read the teachers' kept entries; False for a control, whose targets have K = 0."""
    hidden: bool = False
    """Whether to read the first teacher's hidden states."""
    vocabulary: int | None = None
    """The student's vocabulary size, which every token id is checked against; None skips the check."""
    fusion: FusionSpec = field(default_factory=FusionSpec)


RowsByTeacher = Sequence[ScoredSequence]
"""One item of the dataset: a sequence as each teacher's cache stores it."""


def collate(sequences: Sequence[RowsByTeacher], spec: CollateSpec, *, number: int | None, seed: int) -> MicroBatch:
    """Pack sequences into one micro-batch. Raises AdmissionError for a token id outside the student's vocabulary."""
    rows = [by_teacher[0] for by_teacher in sequences]
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
        targets=_fused(sequences, spec, empty=number is None),
        hidden_TLE=from_bfloat16(np.concatenate([h for h in hidden if h is not None])) if hidden else None,
    )


def _fused(sequences: Sequence[RowsByTeacher], spec: CollateSpec, *, empty: bool) -> Targets:
    if not spec.entries or len(spec.shards) == 1:
        shard = next(iter(spec.shards.values()))
        return _targets([by_teacher[0] for by_teacher in sequences], shard, spec, empty=empty)
    teachers = zip(spec.shards.items(), zip(*sequences, strict=True), strict=True)
    targets = {
        name: _targets(rows, shard, spec, empty=empty).at_temperature(spec.temperature)
        for (name, shard), rows in teachers
    }
    firsts = [by_teacher[0].sequence for by_teacher in sequences]
    return fuse(targets, spec.fusion, [first.domain for first in firsts for _ in first.input_ids_N[1:]])


def _targets(rows: Sequence[ScoredSequence], shard: ShardSpec, spec: CollateSpec, *, empty: bool) -> Targets:
    """Targets of one teacher's rows, one per sequence of the micro-batch."""
    signals = [row.signals for row in rows]
    label_T = np.concatenate([row.sequence.input_ids_N[1:] for row in rows])
    mask_T = np.concatenate([row.sequence.loss_mask_N[1:] for row in rows]).astype(np.float32)
    id_TK, logweight_TK = _entries(signals, spec)
    _check_ids(rows, id_TK, label_T, spec.vocabulary)
    tempered = spec.entries and spec.temperature != 1.0
    log_partitions = [_log_partition(s, shard, spec.temperature) for s in signals] if tempered else []
    return Targets(
        label_T=torch.from_numpy(label_T.astype(np.int64)),
        weight_T=torch.from_numpy(np.zeros_like(mask_T) if empty else mask_T),
        entry_id_TK=torch.from_numpy(id_TK.astype(np.int64)),
        entry_logweight_TK=torch.from_numpy(logweight_TK),
        tail_logmass_T=_concatenated([s.tail_logmass_T for s in signals]),
        teacher_label_logprob_T=_concatenated([s.label_logprob_T for s in signals]),
        teacher_entropy_T=_concatenated([s.entropy_T for s in signals]),
        log_partition_T=_concatenated(log_partitions) if log_partitions else None,
        mode=shard.capture.mode,
    )


def _log_partition(signals: Signals, shard: ShardSpec, temperature: float) -> NDArray[np.float32]:
    """Return the stored log-partition, or rebuild it from the three tail scalars (`capture.any_temperature`)."""
    if temperature in shard.capture.temperatures:
        return signals.log_partition_TC[:, shard.capture.temperatures.index(temperature)]
    return partition_at(signals, shard.vocabulary, temperature)[1]


def _entries(signals: Sequence[Signals], spec: CollateSpec) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and log-weights [T, K], padded to the largest K of the sequences."""
    width = max(s.entry_id_TK.shape[1] for s in signals) if spec.entries else 0
    ids, logweights = [], []
    for s in signals:
        missing = max(0, width - s.entry_id_TK.shape[1])
        padding = ((0, 0), (0, missing))
        ids.append(np.pad(s.entry_id_TK[:, :width], padding))
        logweights.append(np.pad(s.entry_logweight_TK[:, :width], padding, constant_values=-np.inf))
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


def _concatenated(parts: Sequence[NDArray[np.float32]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


def from_bfloat16(bits: Bf16Array) -> Tensor:
    """Return the bfloat16 tensor of stored bits; shares their memory."""
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
