"""What stands in for the layers that a student leaves out, had by least squares before the first step.

Where a student was made of a teacher's layers with some between them left out, the layer behind such a gap gets the
state in front of it. The teacher's state behind the gap lies in the cache. The last matrix W of the layer in front adds
W a to the state, so the change V of W that comes nearest to what is missing, d, is a ridge regression:

    min_V  mean_t |d_t - V a_t|^2 / |h_t|^2  +  RIDGE * sum_i s_i^2 |V_i|^2,     s_i^2 = mean_t a_ti^2 / |h_t|^2

with h_t the teacher's state, since the next layer divides by its size. Every position counts, the first of a sequence
most of all: the others' attention rests on it. After ReplaceMe (arXiv:2505.02819), which solves for a square matrix
behind W rather than for W itself.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.training import layers_after_gaps
from pipeline.errors import RecipeError
from student.data.batch_sampler import BatchSampler
from student.data.collate import from_bfloat16
from student.data.dataset import CacheDataset
from student.model.build import Student

RIDGE = 0.1
"""How much the change is held back, as a share of each input's own size."""
TOKENS = 65_536
"""Tokens that are read at most: several times the inputs of a matrix of any size that is solved in minutes."""


@dataclass(frozen=True, slots=True)
class LayerGap:
    """The student's state `state` should be the teacher's state `teacher_state` (numbered as in the contracts)."""

    state: int
    teacher_state: int


def layer_gaps(kept: Sequence[int], captured: Sequence[int]) -> list[LayerGap]:
    """Where layers are left out between two of `kept`. Raises RecipeError if there are none or a state is missing."""
    behind = layers_after_gaps(kept)
    if not behind:
        raise RecipeError(
            f"training.feature.layer_gap_least_squares: expected a student without some layers between two others, got layers {[*kept]}"
        )
    missing = sorted(set(behind.values()) - set(captured))
    if missing:
        raise RecipeError(
            f"training.feature.layer_gap_least_squares: expected the teacher's states {missing} in the cache, got {[*captured]}; "
            "add them to capture.hidden_layers"
        )
    return [LayerGap(place, layer) for place, layer in behind.items()]


def calibration_sequences(batch_sampler: BatchSampler, dataset: CacheDataset) -> list[int]:
    """The sequences that the training reads first, `TOKENS` of them. No others: a shorter training is told less."""
    chosen, tokens = [], 0
    for number in batch_sampler.sequences():
        if tokens >= TOKENS:
            break
        chosen.append(number)
        tokens += dataset.index[number].tokens
    return chosen


def fill_layer_gaps(
    student: Student, gaps: Sequence[LayerGap], dataset: CacheDataset, numbers: Sequence[int], captured: Sequence[int]
) -> None:
    """Change the last matrix in front of each gap, front to back, by the sequences of these numbers.

    A function of the weights and the cache: every rank and every start comes to the same. Raises RecipeError where a
    layer has no matrix that adds to the state.
    """
    training = student.training
    student.eval()
    for gap in gaps:
        layer = student.layers[gap.state - 1]
        matrix = _last_matrix(layer, student.width)
        _check_adds(student, gap, matrix, _ids(dataset, numbers[0], student))
        slot = captured.index(gap.teacher_state)
        change_DI = _solve(_observed(student, gap, matrix, dataset, number, slot) for number in numbers)
        with torch.no_grad():
            matrix.weight += change_DI.to(matrix.weight)
    student.train(training)


def _last_matrix(layer: nn.Module, width: int) -> nn.Linear:
    found = [m for m in layer.modules() if isinstance(m, nn.Linear) and m.out_features == width]
    if not found:
        raise RecipeError(
            "training.feature.layer_gap_least_squares: expected linear layers in front of the gap, got none of that width"
        )
    return found[-1]


def _check_adds(student: Student, gap: LayerGap, matrix: nn.Linear, ids_N: Tensor) -> None:
    """Twice the matrix must give the state and once more what the matrix adds: so it is not where a norm follows it."""
    with torch.no_grad(), _inputs_of(matrix) as seen:
        once_ND = _state(student, gap.state, ids_N)
        added_ND = seen[0] @ matrix.weight.t()
        matrix.weight *= 2
        twice_ND = _state(student, gap.state, ids_N)
        matrix.weight /= 2
    if added_ND.shape != once_ND.shape or not torch.allclose(twice_ND - once_ND, added_ND, rtol=1e-2, atol=1e-2):
        raise RecipeError(
            f"training.feature.layer_gap_least_squares: expected layer {gap.state - 1} of the student to add what its last matrix gives "
            f"to the state, got a {type(student.layers[gap.state - 1]).__name__} that does more; leave layer_gap_least_squares out"
        )


def _observed(
    student: Student, gap: LayerGap, matrix: nn.Linear, dataset: CacheDataset, number: int, slot: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one sequence: inputs a [T, I], what is missing d [T, D], and 1 / |h|^2 [T, 1]."""
    ids_N, hidden = _ids(dataset, number, student), dataset[number][0].signals.hidden_TLD
    assert hidden is not None
    teacher_TD = from_bfloat16(hidden[:, slot]).to(ids_N.device)
    with torch.no_grad(), _inputs_of(matrix) as seen:
        state_ND = _state(student, gap.state, ids_N)
    rows_T = slice(0, len(teacher_TD))  # a sequence's last token has no row
    weight_T1 = 1 / teacher_TD.square().sum(1, keepdim=True).clamp_min(1e-12)
    return seen[0][rows_T], teacher_TD - state_ND[rows_T], weight_T1


def _solve(observed: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The change [D, I], in float64."""
    gram_II, product_ID = torch.zeros(()), torch.zeros(())
    for input_TI, missing_TD, weight_T1 in observed:
        weighed_IT = (input_TI * weight_T1).double().t()
        gram_II = gram_II.to(weighed_IT) + weighed_IT @ input_TI.double()
        product_ID = product_ID.to(weighed_IT) + weighed_IT @ missing_TD.double()
    size_I1 = gram_II.diagonal()[:, None].sqrt().clamp_min(1e-12)
    ridge_II = RIDGE * torch.eye(len(gram_II), dtype=gram_II.dtype, device=gram_II.device)
    scaled_ID: Tensor = torch.linalg.solve(gram_II / size_I1 / size_I1.t() + ridge_II, product_ID / size_I1)
    return (scaled_ID / size_I1).t()


def _ids(dataset: CacheDataset, number: int, student: Student) -> Tensor:
    return torch.from_numpy(dataset[number][0].sequence.input_ids_N).long().to(student.head()[0].device)


def _state(student: Student, state: int, ids_N: Tensor) -> Tensor:
    positions_N = torch.arange(len(ids_N), device=ids_N.device)
    return student.states(ids_N, positions_N, [state])[1][state].float()


@contextmanager
def _inputs_of(matrix: nn.Linear) -> Iterator[list[Tensor]]:
    """The newest input of the matrix, [N, I]."""
    seen: list[Tensor] = []

    def note(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen[:] = [inputs[0].flatten(0, -2).float()]

    hook = matrix.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        hook.remove()
