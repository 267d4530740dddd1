"""How good a model is on held-out text, against the teacher's exact distribution: no estimate, no sampling.

The teacher is not in memory. Its exact distribution comes back from the state that its LM head read, which the cache
keeps for held-out sequences, times that head, a slice of the vocabulary at a time.
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
"""Of one [rows, V] tensor of float32."""
VOCABULARY_SLICE = 8192
ECE_BINS = 15

Logits = Callable[[Tensor], Tensor]
"""States [R, D] to logits [R, V], float32."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """What a model comes to on the held-out labels."""

    bits_per_byte: float
    kl_to_teacher: float
    """Nats per label, over the whole vocabulary: KL(teacher || model)."""
    top1_agreement: float
    """Share of labels at which both hold the same token for the likeliest."""
    acceptance: float
    """Sum over tokens of min(p, q): how often speculative decoding would accept the model's draft."""
    calibration_error: float
    """Expected calibration error of the likeliest token, 15 bins of equal width."""


@dataclass
class MetricAccumulator:
    """Sums over labels, of one model."""

    labels: int = 0
    bytes: int = 0
    nll_nats: float = 0.0
    kl_nats: float = 0.0
    agreed: float = 0.0
    accepted: float = 0.0
    bin_Z3: Tensor = field(default_factory=lambda: torch.zeros(ECE_BINS, 3, dtype=torch.float64))
    """Labels, confidence and hits of each bin."""

    def add(self, logprob_RV: Tensor, teacher_RV: Tensor, label_R: Tensor) -> None:
        """Take some labels. Both are log-probabilities over one vocabulary."""
        teacher_prob_RV = teacher_RV.exp()
        top_R = logprob_RV.max(dim=1)
        self.labels += len(label_R)
        self.nll_nats -= float(logprob_RV.gather(1, label_R[:, None]).double().sum())
        self.kl_nats += float((teacher_prob_RV * (teacher_RV - logprob_RV)).sum(dim=1).double().sum())
        self.agreed += float((top_R.indices == teacher_RV.argmax(dim=1)).sum())
        accepted_R = torch.minimum(teacher_prob_RV, logprob_RV.exp()).sum(dim=1)
        self.accepted += float(accepted_R.clamp(max=1.0).double().sum())  # a row's float32 sums to 1 and a little
        self._bin(top_R.values.exp().double(), (top_R.indices == label_R).double())

    def measures(self) -> Metrics:
        """Means over all labels."""
        counts, confidence, hits = self.bin_Z3.unbind(dim=1)
        return Metrics(
            bits_per_byte=self.nll_nats / math.log(2) / max(1, self.bytes),
            kl_to_teacher=self.kl_nats / self.labels,
            top1_agreement=self.agreed / self.labels,
            acceptance=self.accepted / self.labels,
            calibration_error=float((confidence - hits).abs().sum() / counts.sum()),
        )

    def _bin(self, confidence_R: Tensor, hit_R: Tensor) -> None:
        bin_R = (confidence_R * ECE_BINS).long().clamp(0, ECE_BINS - 1).cpu()
        values_R3 = torch.stack([torch.ones_like(hit_R), confidence_R, hit_R], dim=1).cpu()
        self.bin_Z3.index_add_(0, bin_R, values_R3)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Some held-out sequences, packed, with the teacher's states at the rows whose labels count."""

    input_ids_N: Tensor
    position_ids_N: Tensor
    row_T: Tensor
    label_T: Tensor
    teacher_state_TE: Tensor
    bytes: int
    """Of the text that the labels cover."""


def pack_held_out(rows: Sequence[ScoredSequence], device: torch.device) -> HeldOut:
    """Sequences end to end. Every one must carry `exact_hidden_TD`."""
    ids, positions, places, states, covered, start = [], [], [], [], 0, 0
    for row in rows:
        sequence, exact_TD = row.sequence, row.signals.exact_hidden_TD
        assert exact_TD is not None
        counts_T = sequence.loss_mask_N[1:].astype(bool)
        ids.append(torch.from_numpy(sequence.input_ids_N.astype(np.int64)))
        positions.append(torch.arange(len(sequence.input_ids_N)))
        places.append(torch.from_numpy(np.flatnonzero(counts_T)) + start)
        states.append(from_bfloat16(np.ascontiguousarray(exact_TD[counts_T])))
        covered += int(np.diff(sequence.byte_end_N)[counts_T].sum())
        start += len(sequence.input_ids_N)
    ids_N, row_T = torch.cat(ids), torch.cat(places)
    return HeldOut(
        input_ids_N=ids_N.to(device),
        position_ids_N=torch.cat(positions).to(device),
        row_T=row_T.to(device),
        label_T=ids_N[row_T + 1].to(device),
        teacher_state_TE=torch.cat(states).to(device),
        bytes=covered,
    )


def measure(
    batches: Iterator[HeldOut], head: LmHead, model: Student, spec: HeadSpec
) -> tuple[MetricAccumulator, MetricAccumulator]:
    """(model, teacher) over all batches. Where vocabularies differ in width, both are held to the ids they share."""
    ours, theirs = MetricAccumulator(), MetricAccumulator()
    teacher_logits, width = teacher_logits_function(head), min(head.weight_VD.shape[0], model.vocabulary)
    with torch.no_grad():
        for batch in batches:
            state_ND, _ = model.states(batch.input_ids_N, batch.position_ids_N)
            ours.bytes, theirs.bytes = ours.bytes + batch.bytes, theirs.bytes + batch.bytes
            rows = max(1, CHUNK_BYTES // (4 * width))
            cuts = list(range(rows, len(batch.row_T), rows))
            for chunk in torch.arange(len(batch.row_T), device=batch.row_T.device).tensor_split(cuts):
                teacher_RV = teacher_logits(batch.teacher_state_TE[chunk])[:, :width].log_softmax(dim=1)
                model_RV = student_logits_function(model, spec)(state_ND[batch.row_T[chunk]])[:, :width].log_softmax(
                    dim=1
                )
                ours.add(model_RV, teacher_RV, batch.label_T[chunk])
                theirs.add(teacher_RV, teacher_RV, batch.label_T[chunk])
    return ours, theirs


def teacher_logits_function(head: LmHead) -> Logits:
    """The cache's LM head as a function; its weight stays in bfloat16 but for the slice at work."""
    weight_VD = from_bfloat16(np.ascontiguousarray(head.weight_VD))
    bias_V = None if head.bias_V is None else torch.from_numpy(np.ascontiguousarray(head.bias_V))

    cuts = list(range(VOCABULARY_SLICE, len(weight_VD), VOCABULARY_SLICE))

    def logits(state_RD: Tensor) -> Tensor:
        slices = (slice_VD.to(state_RD.device).float() for slice_VD in weight_VD.tensor_split(cuts))
        logits_RV = torch.cat([state_RD.float() @ slice_VD.T for slice_VD in slices], dim=1)
        if bias_V is not None:
            logits_RV += bias_V.to(state_RD.device)
        return _finished(logits_RV, head.scale, head.soft_cap)

    return logits


def student_logits_function(model: Student, spec: HeadSpec) -> Logits:
    """A model's own LM head as a function."""
    weight_VD, bias_V = model.head()

    def logits(state_RD: Tensor) -> Tensor:
        return _finished(torch.nn.functional.linear(state_RD, weight_VD, bias_V).float(), spec.scale, spec.soft_cap)

    return logits


def _finished(logits_RV: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    logits_RV = logits_RV * scale
    return logits_RV if soft_cap is None else soft_cap * torch.tanh(logits_RV / soft_cap)
