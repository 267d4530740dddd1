"""Which positions, and which sequences, the output loss is taken at.

Shares are of the rows that count in a micro-batch. What is kept by share is scaled up by 1 / share, so that the output
loss keeps its size; a threshold on the teacher's entropy is a mask alone (where the teacher is sure, the label says
the same).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.config.training import SelectionSpec
from pipeline.contracts import FloatArray
from pipeline.errors import RecipeError
from student.head import HeadSpec
from student.row_statistics import row_statistics
from student.targets import Targets


def select(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets: Targets,
    selection: SelectionSpec,
    spec: HeadSpec,
    chunk_rows: int,
    seed: int,
) -> Targets:
    """`targets` with `kd_weight_T` set: 0 where the output loss is not taken.

    By `student_entropy` (the rows where the student is least sure) and `ce_ratio` (where its label cost is highest
    against the teacher's), the student's logits are walked through once more, without gradient. `random` is a pure
    function of `seed`: give it the step's.
    """
    if selection.by == "all":
        return targets
    counts_T = targets.output_weight != 0
    if selection.by == "teacher_entropy" and selection.threshold is not None:
        return _weighted(targets, (targets.teacher_entropy_T >= selection.threshold).float())
    if selection.by == "random":
        score_T = torch.rand(targets.rows, generator=torch.Generator().manual_seed(seed)).to(counts_T.device)
    elif selection.by == "teacher_entropy":
        score_T = targets.teacher_entropy_T
    else:
        entropy_T, label_logprob_T = row_statistics(hidden_TD, weight_VD, bias_V, targets, spec, chunk_rows)
        ratio_T = label_logprob_T / targets.teacher_label_logprob_T.clamp_max(-1e-3)
        score_T = entropy_T if selection.by == "student_entropy" else ratio_T
    return _weighted(targets, highest(score_T, counts_T, selection.share).float() / selection.share)


def highest(score_T: Tensor, counts_T: Tensor, share: float) -> Tensor:
    """bool: the highest `share` of the rows that count, by score; ties go to earlier rows, and at least one is kept."""
    kept = max(1, round(share * int(counts_T.sum())))
    order_T = torch.sort(score_T.masked_fill(~counts_T, -torch.inf), descending=True, stable=True).indices
    chosen_T = torch.zeros_like(counts_T)
    chosen_T[order_T[:kept]] = True
    return chosen_T & counts_T


def _weighted(targets: Targets, factor_T: Tensor) -> Targets:
    before_T = targets.kd_weight_T
    return replace(targets, kd_weight_T=factor_T if before_T is None else before_T * factor_T)


def by_difference(
    teacher_label_logprob: Sequence[FloatArray], reference_label_logprob: Sequence[FloatArray], share: float
) -> NDArray[np.bool_]:
    """Which sequences to keep by difference sampling (Gu et al. 2024, MiniPLM): one bool a sequence.

    Kept: the `share` in which the teacher's mean label log-prob exceeds that of a small reference model by most. Ties
    go to earlier sequences. Raises RecipeError where the two sides are not the same rows.
    """
    pairs = _pairs(teacher_label_logprob, reference_label_logprob)
    gaps = np.array([_mean_gap(at, teacher_T, reference_T) for at, (teacher_T, reference_T) in enumerate(pairs)])
    kept = np.zeros(len(gaps), dtype=np.bool_)
    kept[np.argsort(-gaps, kind="stable")[: round(share * len(gaps))]] = True
    return kept


def _pairs(left: Sequence[FloatArray], right: Sequence[FloatArray]) -> list[tuple[FloatArray, FloatArray]]:
    if len(left) != len(right):
        raise RecipeError(f"difference sampling: expected as many reference sequences as {len(left)}, got {len(right)}")
    return list(zip(left, right, strict=True))


def _mean_gap(at: int, teacher_T: FloatArray, reference_T: FloatArray) -> float:
    if teacher_T.shape != reference_T.shape or not teacher_T.size:
        raise RecipeError(
            f"difference sampling: sequence {at}: expected the same rows on both sides and at least one, "
            f"got {teacher_T.size} of the teacher and {reference_T.size} of the reference"
        )
    return float(np.mean(teacher_T.astype(np.float64) - reference_T.astype(np.float64)))
