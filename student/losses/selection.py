"""Token selection (rows of the output loss) and sequence selection (difference sampling).

Rows are selected within each sequence, so the packing of a micro-batch changes no weight. A share refers to the rows of
a sequence with nonzero weight. Kept rows are scaled by valid / kept, and weights by score have mean 1, so that the size
of the output loss does not change. A threshold on the teacher's entropy is a plain mask without scaling.
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
    """Which rows of a micro-batch belong to which sequence."""

    sequence_ids: Sequence[str]
    rows: Sequence[int]
    """Number of rows of each sequence, in order; they sum to T."""
    seed: int
    """Seed of the step: `random` scores are a pure function of it and of a sequence's id."""

    def sequence_T(self, device: torch.device) -> Tensor:  # noqa: N802
        """Return the number of each row's sequence, int64 [T]."""
        return torch.repeat_interleave(torch.tensor(self.rows, device=device))


def select(
    targets: Targets, selection: SelectionSpec, packed: PackedSequences, student: Callable[[], tuple[Tensor, Tensor]]
) -> Targets:
    """Return `targets` with `kd_weight_T` multiplied by the selection's weights; 0 excludes a row from the output loss.

    `student` computes the student's (entropy_T, label_logprob_T) from its logits. It is called only for
    `student_entropy` (select rows of high entropy) and `ce_ratio` (rows where the student's cross-entropy of the label
    is highest relative to the teacher's).
    """
    if selection.by == "all":
        return targets
    if selection.threshold is not None:
        return _weighted(targets, (targets.teacher_entropy_T >= selection.threshold).float())
    score_T = _score(targets, selection, packed, student)
    valid_T, sequence_T = targets.output_weight != 0, packed.sequence_T(targets.label_T.device)
    if selection.how == "keep":
        return _weighted(targets, top_share_weights(score_T, valid_T, sequence_T, selection.share))
    return _weighted(targets, normalized(score_T, valid_T, sequence_T))


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
    """Uniform numbers, one per row, from one generator per sequence."""
    draws = []
    for name, rows in zip(packed.sequence_ids, packed.rows, strict=True):
        digest = hashlib.sha256(f"{packed.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        draws.append(torch.rand(rows, generator=generator))
    return torch.cat(draws)


def top_share_weights(score_T: Tensor, valid_T: Tensor, sequence_T: Tensor, share: float) -> Tensor:
    """Weight the `share` of each sequence's valid rows with the highest scores by valid / kept, all others by 0.

    Ties go to earlier rows, and at least one row of a sequence is kept.
    """
    order_T = torch.sort(score_T.masked_fill(~valid_T, -torch.inf), descending=True, stable=True).indices
    order_T = order_T[torch.sort(sequence_T[order_T], stable=True).indices]
    valid_S = _sums(valid_T.double(), sequence_T)
    kept_S = (share * valid_S).round().clamp_min(1.0)
    first_S = torch.bincount(sequence_T).cumsum(dim=0).roll(1)
    first_S[:1] = 0
    rank_T = torch.empty_like(order_T)
    rank_T[order_T] = torch.arange(len(order_T), device=order_T.device)
    kept_T = (rank_T - first_S[sequence_T] < kept_S[sequence_T]) & valid_T
    return torch.where(kept_T, (valid_S / kept_S)[sequence_T], 0.0).float()


def normalized(score_T: Tensor, valid_T: Tensor, sequence_T: Tensor) -> Tensor:
    """Divide scores by their mean over the valid rows of the sequence; 0 for invalid rows, 1 if all scores are 0."""
    score_T = torch.where(valid_T, score_T.double(), 0.0)
    mean_T = (_sums(score_T, sequence_T) / _sums(valid_T.double(), sequence_T).clamp_min(1.0))[sequence_T]
    return torch.where(mean_T > 0.0, score_T / mean_T, valid_T.double()).float()


def _sums(value_T: Tensor, sequence_T: Tensor) -> Tensor:
    """Sum over the rows of each sequence, [S]."""
    return torch.bincount(sequence_T, weights=value_T)


def _weighted(targets: Targets, factor_T: Tensor) -> Targets:
    before_T = targets.kd_weight_T
    return replace(targets, kd_weight_T=factor_T if before_T is None else before_T * factor_T)


def difference_sampling(pairs: Iterable[tuple[FloatArray, FloatArray]], share: float) -> NDArray[np.bool_]:
    """Select sequences by difference sampling (Gu et al. 2024, MiniPLM); returns one bool per sequence.

    `pairs` holds each sequence's label log-probabilities under the teacher and under a small reference model. Selects
    the `share` of sequences with the largest mean difference teacher - reference, earlier ones first among equals.
    Raises RecipeError if the two sides of a pair have different rows or none.
    """
    differences = np.array(
        [_mean_difference(number, teacher_T, reference_T) for number, (teacher_T, reference_T) in enumerate(pairs)]
    )
    kept = np.zeros(len(differences), dtype=np.bool_)
    kept[np.argsort(-differences, kind="stable")[: round(share * len(differences))]] = True
    return kept


def _mean_difference(number: int, teacher_T: FloatArray, reference_T: FloatArray) -> float:
    if teacher_T.shape != reference_T.shape or not teacher_T.size:
        raise RecipeError(
            f"difference sampling: sequence {number}: expected the same rows on both sides and at least one, "
            f"got {teacher_T.size} of the teacher and {reference_T.size} of the reference"
        )
    return float(np.mean(teacher_T.astype(np.float64) - reference_T.astype(np.float64)))
