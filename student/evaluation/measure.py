"""Metrics of a model on held-out text, computed exactly against the teacher's full distribution.

The teacher is not loaded. Its logits are the product of the hidden states before its LM head, which the cache has for
held-out sequences, and of the cached LM head, a slice of the vocabulary at a time.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.contracts import LmHead, ScoredSequence
from student.data.collate import from_bfloat16
from student.head.chunked import HeadSpec
from student.model.build import Student

CHUNK_BYTES = 64 << 20
"""Size of one float32 tensor [R, V]."""
VOCABULARY_SLICE = 8192
ECE_BINS = 15

LogitsFunction = Callable[[Tensor], Tensor]
"""Hidden states [R, D] to logits [R, V], float32."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Metrics of one model on the held-out labels."""

    bits_per_byte: float
    """Negative log-likelihood of the labels in bits, per byte of their text: comparable across tokenizers."""
    kl_to_teacher: float
    """Nats per label, over the whole vocabulary: KL(teacher || model)."""
    top1_agreement: float
    """Share of labels at which model and teacher have the same most likely token."""
    acceptance: float
    """Acceptance rate in speculative decoding with the model as draft: mean of sum_v min(p_v, q_v) (Leviathan 2023)."""
    calibration_error: float
    """Expected calibration error (ECE) of the most likely token, 15 bins of equal width (Guo et al. 2017)."""


@dataclass
class MetricAccumulator:
    """Sums over labels for the metrics of one model."""

    labels: int = 0
    bytes: int = 0
    nll_nats: float = 0.0
    kl_nats: float = 0.0
    top1_matches: float = 0.0
    acceptance: float = 0.0
    bin_Z3: Tensor = field(default_factory=lambda: torch.zeros(ECE_BINS, 3, dtype=torch.float64))
    """Labels, summed confidence and correct predictions of each bin."""

    def update(self, logprob_RV: Tensor, teacher_RV: Tensor, label_R: Tensor) -> None:
        """Add labels, with the log-probabilities of model and teacher over the same vocabulary."""
        teacher_prob_RV = teacher_RV.exp()
        top_R = logprob_RV.max(dim=1)
        self.labels += len(label_R)
        self.nll_nats -= float(logprob_RV.gather(1, label_R[:, None]).double().sum())
        self.kl_nats += float((teacher_prob_RV * (teacher_RV - logprob_RV)).sum(dim=1).double().sum())
        self.top1_matches += float((top_R.indices == teacher_RV.argmax(dim=1)).sum())
        acceptance_R = torch.minimum(teacher_prob_RV, logprob_RV.exp()).sum(dim=1)
        self.acceptance += float(acceptance_R.clamp(max=1.0).double().sum())  # float32 rounding may exceed 1
        self._add_to_bins(top_R.values.exp().double(), (top_R.indices == label_R).double())

    def compute(self) -> Metrics:
        """Metrics over all labels so far."""
        counts, confidence, correct = self.bin_Z3.unbind(dim=1)
        return Metrics(
            bits_per_byte=self.nll_nats / math.log(2) / max(1, self.bytes),
            kl_to_teacher=self.kl_nats / self.labels,
            top1_agreement=self.top1_matches / self.labels,
            acceptance=self.acceptance / self.labels,
            calibration_error=float((confidence - correct).abs().sum() / counts.sum()),
        )

    def _add_to_bins(self, confidence_R: Tensor, correct_R: Tensor) -> None:
        bin_R = (confidence_R * ECE_BINS).long().clamp(0, ECE_BINS - 1).cpu()
        values_R3 = torch.stack([torch.ones_like(correct_R), confidence_R, correct_R], dim=1).cpu()
        self.bin_Z3.index_add_(0, bin_R, values_R3)


@dataclass(frozen=True, slots=True)
class HeldOutBatch:
    """Packed held-out sequences, with the teacher's hidden states at the T rows whose labels are not masked."""

    input_ids_N: Tensor
    position_ids_N: Tensor
    row_T: Tensor
    label_T: Tensor
    teacher_hidden_TE: Tensor
    bytes: int
    """UTF-8 bytes of the labels."""


def pack_held_out(rows: Sequence[ScoredSequence], device: torch.device) -> HeldOutBatch:
    """Concatenate sequences, which must all have `exact_hidden_TD`."""
    ids, positions, row_numbers, states, label_bytes, start = [], [], [], [], 0, 0
    for row in rows:
        sequence, exact_TD = row.sequence, row.signals.exact_hidden_TD
        assert exact_TD is not None
        mask_T = sequence.loss_mask_N[1:].astype(bool)
        ids.append(torch.from_numpy(sequence.input_ids_N.astype(np.int64)))
        positions.append(torch.arange(len(sequence.input_ids_N)))
        row_numbers.append(torch.from_numpy(np.flatnonzero(mask_T)) + start)
        states.append(from_bfloat16(np.ascontiguousarray(exact_TD[mask_T])))
        label_bytes += int(np.diff(sequence.byte_end_N)[mask_T].sum())
        start += len(sequence.input_ids_N)
    ids_N, row_T = torch.cat(ids), torch.cat(row_numbers)
    return HeldOutBatch(
        input_ids_N=ids_N.to(device),
        position_ids_N=torch.cat(positions).to(device),
        row_T=row_T.to(device),
        label_T=ids_N[row_T + 1].to(device),
        teacher_hidden_TE=torch.cat(states).to(device),
        bytes=label_bytes,
    )


def measure(
    batches: Iterator[HeldOutBatch], head: LmHead, model: Student, spec: HeadSpec
) -> tuple[MetricAccumulator, MetricAccumulator]:
    """Accumulate the metrics of (model, teacher). Vocabularies of different sizes are cut to the smaller."""
    of_model, of_teacher = MetricAccumulator(), MetricAccumulator()
    teacher_logits, model_logits = teacher_logits_function(head), student_logits_function(model, spec)
    width = min(head.weight_VD.shape[0], model.vocabulary)
    with torch.no_grad():
        for batch in batches:
            hidden_ND, _ = model.states(batch.input_ids_N, batch.position_ids_N)
            of_model.bytes, of_teacher.bytes = of_model.bytes + batch.bytes, of_teacher.bytes + batch.bytes
            rows = max(1, CHUNK_BYTES // (4 * width))
            for index_R in torch.split(torch.arange(len(batch.row_T), device=batch.row_T.device), rows):
                teacher_RV = teacher_logits(batch.teacher_hidden_TE[index_R])[:, :width].log_softmax(dim=1)
                model_RV = model_logits(hidden_ND[batch.row_T[index_R]])[:, :width].log_softmax(dim=1)
                of_model.update(model_RV, teacher_RV, batch.label_T[index_R])
                of_teacher.update(teacher_RV, teacher_RV, batch.label_T[index_R])
    return of_model, of_teacher


def teacher_logits_function(head: LmHead) -> LogitsFunction:
    """The cached LM head as a function. Its weight stays in bfloat16; one slice at a time is float32."""
    weight_VD = from_bfloat16(np.ascontiguousarray(head.weight_VD))
    bias_V = None if head.bias_V is None else torch.from_numpy(np.ascontiguousarray(head.bias_V))

    def logits(hidden_RD: Tensor) -> Tensor:
        slices = (slice_VD.to(hidden_RD.device).float() for slice_VD in torch.split(weight_VD, VOCABULARY_SLICE))
        logits_RV = torch.cat([hidden_RD.float() @ slice_VD.T for slice_VD in slices], dim=1)
        if bias_V is not None:
            logits_RV += bias_V.to(hidden_RD.device)
        return _scale_and_soft_cap(logits_RV, head.scale, head.soft_cap)

    return logits


def student_logits_function(model: Student, spec: HeadSpec) -> LogitsFunction:
    """The student's LM head as a function."""
    weight_VD, bias_V = model.head()

    def logits(hidden_RD: Tensor) -> Tensor:
        logits_RV = torch.nn.functional.linear(hidden_RD, weight_VD, bias_V).float()
        return _scale_and_soft_cap(logits_RV, spec.scale, spec.soft_cap)

    return logits


def _scale_and_soft_cap(logits_RV: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    logits_RV = logits_RV * scale
    return logits_RV if soft_cap is None else soft_cap * torch.tanh(logits_RV / soft_cap)
