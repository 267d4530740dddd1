"""Which positions, and which sequences, the output loss is taken at.

Everything is decided within one sequence, so how sequences are packed changes nothing. Shares are of a sequence's rows
that count; what is kept is scaled up by counted / kept, and weights have a mean of 1, so that the output loss keeps its
size. A threshold on the teacher's entropy is a mask alone (where the teacher is sure, the label says the same).
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.training import SelectionSpec
from pipeline.contracts import FloatArray
from pipeline.errors import RecipeError
from student.data.targets import Targets


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """The sequences of a micro-batch, in the order of its rows."""

    sequence_ids: Sequence[str]
    rows: Sequence[int]
    """Of each sequence; they sum to T."""
    seed: int
    """The step's: what `random` is a pure function of, together with a sequence's id."""

    def sequence_T(self, device: torch.device) -> Tensor:  # noqa: N802
        """int64: the number of the sequence that each row lies in."""
        return torch.repeat_interleave(torch.tensor(self.rows, device=device))


def select(
    targets: Targets, selection: SelectionSpec, packed: PackedSequences, student: Callable[[], tuple[Tensor, Tensor]]
) -> Targets:
    """`targets` with `kd_weight_T` set: 0 where the output loss is not taken.

    `student` gives the student's (entropy_T, label_logprob_T), which costs a walk through its logits: called only by
    `student_entropy` (the rows where the student is least sure) and `ce_ratio` (where its label cost is highest
    against the teacher's).
    """
    if selection.by == "all":
        return targets
    if selection.threshold is not None:
        return _weighted(targets, (targets.teacher_entropy_T >= selection.threshold).float())
    score_T = _score(targets, selection, packed, student)
    counts_T, sequence_T = targets.output_weight != 0, packed.sequence_T(targets.label_T.device)
    if selection.how == "keep":
        return _weighted(targets, top_share_weights(score_T, counts_T, sequence_T, selection.share))
    return _weighted(targets, relative(score_T, counts_T, sequence_T))


def _score(
    targets: Targets, selection: SelectionSpec, packed: PackedSequences, student: Callable[[], tuple[Tensor, Tensor]]
) -> Tensor:
    if selection.by == "random":
        return _random(packed).to(targets.label_T.device)
    if selection.by == "teacher_entropy":
        return targets.teacher_entropy_T
    if selection.by == "label_cost":
        return -targets.teacher_label_logprob_T
    entropy_T, label_logprob_T = student()
    if selection.by == "student_entropy":
        return entropy_T
    return label_logprob_T / targets.teacher_label_logprob_T.clamp_max(-1e-3)


def _random(packed: PackedSequences) -> Tensor:
    """One number a row, drawn sequence by sequence."""
    draws = []
    for name, rows in zip(packed.sequence_ids, packed.rows, strict=True):
        digest = hashlib.sha256(f"{packed.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        draws.append(torch.rand(rows, generator=generator))
    return torch.cat(draws)


def top_share_weights(score_T: Tensor, counts_T: Tensor, sequence_T: Tensor, share: float) -> Tensor:
    """counted / kept at the highest `share` of each sequence's rows that count, by score; 0 elsewhere.

    Ties go to earlier rows, and at least one row of a sequence is kept.
    """
    order_T = torch.sort(score_T.masked_fill(~counts_T, -torch.inf), descending=True, stable=True).indices
    order_T = order_T[torch.sort(sequence_T[order_T], stable=True).indices]
    counted_S = _sums(counts_T.double(), sequence_T)
    kept_S = (share * counted_S).round().clamp_min(1.0)
    first_S = torch.bincount(sequence_T).cumsum(dim=0).roll(1)
    first_S[:1] = 0
    place_T = torch.empty_like(order_T)
    place_T[order_T] = torch.arange(len(order_T), device=order_T.device)
    kept_T = (place_T - first_S[sequence_T] < kept_S[sequence_T]) & counts_T
    return torch.where(kept_T, (counted_S / kept_S)[sequence_T], 0.0).float()


def relative(score_T: Tensor, counts_T: Tensor, sequence_T: Tensor) -> Tensor:
    """Each score over the mean of its sequence's rows that count: 0 where a row does not, 1 where all scores are 0."""
    score_T = torch.where(counts_T, score_T.double(), 0.0)
    mean_T = (_sums(score_T, sequence_T) / _sums(counts_T.double(), sequence_T).clamp_min(1.0))[sequence_T]
    return torch.where(mean_T > 0.0, score_T / mean_T, counts_T.double()).float()


def _sums(value_T: Tensor, sequence_T: Tensor) -> Tensor:
    """The sum over each sequence's rows."""
    return torch.bincount(sequence_T, weights=value_T)


def _weighted(targets: Targets, factor_T: Tensor) -> Targets:
    before_T = targets.kd_weight_T
    return replace(targets, kd_weight_T=factor_T if before_T is None else before_T * factor_T)


def difference_sampling(pairs: Iterable[tuple[FloatArray, FloatArray]], share: float) -> NDArray[np.bool_]:
    """Which sequences to keep by difference sampling (Gu et al. 2024, MiniPLM): one bool a sequence.

    `pairs`: a sequence's label log-probs by the teacher and by a small reference model. Kept: the `share` in which the
    teacher's mean exceeds the reference's by most. Ties go to earlier sequences. Raises RecipeError where the two
    sides are not the same rows.
    """
    gaps = np.array([_mean_gap(at, teacher_T, reference_T) for at, (teacher_T, reference_T) in enumerate(pairs)])
    kept = np.zeros(len(gaps), dtype=np.bool_)
    kept[np.argsort(-gaps, kind="stable")[: round(share * len(gaps))]] = True
    return kept


def _mean_gap(at: int, teacher_T: FloatArray, reference_T: FloatArray) -> float:
    if teacher_T.shape != reference_T.shape or not teacher_T.size:
        raise RecipeError(
            f"difference sampling: sequence {at}: expected the same rows on both sides and at least one, "
            f"got {teacher_T.size} of the teacher and {reference_T.size} of the reference"
        )
    return float(np.mean(teacher_T.astype(np.float64) - reference_T.astype(np.float64)))
