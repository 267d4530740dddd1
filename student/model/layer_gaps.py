"""Closed-form compensation of pruned layers: ridge regression of the last matrix in front of each gap.

Where layers between two kept ones are pruned, the layer behind the gap receives the state in front of it. The cache
stores the teacher's state h behind the gap. The last matrix W of the layer in front adds W a to the student's state x,
so the change V of W that brings x closest to h solves, with d = h - x:

    min_V  mean_t |d_t - V a_t|^2 / |h_t|^2  +  RIDGE * sum_i s_i^2 |V_i|^2,     s_i^2 = mean_t a_ti^2 / |h_t|^2

V_i is column i of V [D, I]. The division by |h_t|^2 makes the error relative, as the next layer normalizes its input.
All positions are used, also the first of a sequence, which is an attention sink for the others.

Related work: ReplaceMe (Shopkhoev et al. 2025, arXiv:2505.02819) solves min_S mean_t |d_t + W a_t - S W a_t|^2 for a
square matrix S [D, D] and merges it into W as S W; here W itself changes, with weights and a ridge penalty.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.training import layers_after_gaps
from pipeline.errors import RecipeError
from student.data.batch_sampler import BatchSampler
from student.data.collate import from_bfloat16
from student.data.dataset import CacheDataset
from student.model.build import Student

KEY = "training.feature.layer_gap_least_squares"
RIDGE = 0.1
"""Strength of the penalty, relative to the weighted mean square of each input feature."""
CALIBRATION_TOKENS = 65_536
"""Tokens to read: several times the input features I of any matrix that can be solved in minutes."""


def layer_gaps(kept: Sequence[int], captured: Sequence[int]) -> dict[int, int]:
    """Map the student's state in front of each gap between `kept` layers to the teacher's state behind it.

    Numbers as in `pipeline.contracts`. Raises RecipeError if there is no gap, or its state is not `captured`.
    """
    teacher_states = layers_after_gaps(kept)
    if not teacher_states:
        raise RecipeError(f"{KEY}: expected a student with pruned layers between two kept ones, got layers {[*kept]}")
    missing = sorted(set(teacher_states.values()) - set(captured))
    if missing:
        raise RecipeError(
            f"{KEY}: expected the teacher's states {missing} in the cache, got {[*captured]}; "
            "add them to capture.hidden_layers"
        )
    return teacher_states


def calibration_sequences(batch_sampler: BatchSampler, dataset: CacheDataset) -> list[int]:
    """Return the first training sequences, CALIBRATION_TOKENS in all: no data beyond what the run trains on."""
    chosen, tokens = [], 0
    for number in batch_sampler.sequences():
        if tokens >= CALIBRATION_TOKENS:
            break
        chosen.append(number)
        tokens += dataset.index[number].tokens
    return chosen


def fill_layer_gaps(
    student: Student, gaps: Mapping[int, int], dataset: CacheDataset, numbers: Sequence[int], captured: Sequence[int]
) -> None:
    """Change the last matrix in front of each gap, front to back, fitted on the sequences `numbers` of the dataset.

    Deterministic in weights and cache, so every rank and every restart computes the same change. Raises RecipeError if
    a layer has no linear layer whose output is added to the state.
    """
    training = student.training
    student.eval()
    for state, teacher_state in gaps.items():
        matrix = _last_matrix(student.layers[state - 1], student.width)
        _check_adds(student, state, matrix, _ids(dataset, numbers[0], student))
        slot = captured.index(teacher_state)
        change_DI = _solve(_observed(student, state, matrix, dataset, number, slot) for number in numbers)
        with torch.no_grad():
            matrix.weight += change_DI.to(matrix.weight)
    student.train(training)


def _last_matrix(layer: nn.Module, width: int) -> nn.Linear:
    matrices = [m for m in layer.modules() if isinstance(m, nn.Linear) and m.out_features == width]
    if not matrices:
        raise RecipeError(f"{KEY}: expected a linear layer of output width {width} in front of the gap, got none")
    return matrices[-1]


def _check_adds(student: Student, state: int, matrix: nn.Linear, ids_N: Tensor) -> None:
    """Raise RecipeError unless doubling W changes the state by W a; it does not if a norm follows (Gemma 2)."""
    with torch.no_grad(), _input_of(matrix) as inputs:
        once_ND = _state(student, state, ids_N)
        added_ND = inputs[0] @ matrix.weight.t()
        matrix.weight *= 2
        twice_ND = _state(student, state, ids_N)
        matrix.weight /= 2
    if added_ND.shape != once_ND.shape or not torch.allclose(twice_ND - once_ND, added_ND, rtol=1e-2, atol=1e-2):
        raise RecipeError(
            f"{KEY}: expected layer {state - 1} of the student to add the output of its last matrix to "
            f"the state, got a {type(student.layers[state - 1]).__name__} which transforms it; set it to false"
        )


def _observed(
    student: Student, state: int, matrix: nn.Linear, dataset: CacheDataset, number: int, slot: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return input a [T, I], missing d [T, D] and weight 1 / |h|^2 [T, 1] of one sequence."""
    ids_N, hidden = _ids(dataset, number, student), dataset[number][0].signals.hidden_TLD
    assert hidden is not None
    teacher_TD = from_bfloat16(hidden[:, slot]).to(ids_N.device)
    with torch.no_grad(), _input_of(matrix) as inputs:
        state_ND = _state(student, state, ids_N)
    rows_T = slice(0, len(teacher_TD))  # a sequence's last token has no row
    weight_T1 = 1 / teacher_TD.square().sum(1, keepdim=True).clamp_min(1e-12)
    return inputs[0][rows_T], teacher_TD - state_ND[rows_T], weight_T1


def _solve(observed: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Solve the ridge regression from its normal equations in float64; returns V [D, I]."""
    gram_II, product_ID = torch.zeros(()), torch.zeros(())
    for input_TI, missing_TD, weight_T1 in observed:
        weighted_IT = (input_TI * weight_T1).double().t()
        gram_II = gram_II.to(weighted_IT) + weighted_IT @ input_TI.double()
        product_ID = product_ID.to(weighted_IT) + weighted_IT @ missing_TD.double()
    scale_I1 = gram_II.diagonal()[:, None].sqrt().clamp_min(1e-12)
    ridge_II = RIDGE * torch.eye(len(gram_II), dtype=gram_II.dtype, device=gram_II.device)
    scaled_ID: Tensor = torch.linalg.solve(gram_II / scale_I1 / scale_I1.t() + ridge_II, product_ID / scale_I1)
    return (scaled_ID / scale_I1).t()


def _ids(dataset: CacheDataset, number: int, student: Student) -> Tensor:
    return torch.from_numpy(dataset[number][0].sequence.input_ids_N).long().to(student.head()[0].device)


def _state(student: Student, state: int, ids_N: Tensor) -> Tensor:
    positions_N = torch.arange(len(ids_N), device=ids_N.device)
    return student.states(ids_N, positions_N, [state])[1][state].float()


@contextmanager
def _input_of(matrix: nn.Linear) -> Iterator[list[Tensor]]:
    """Yield a list that holds the matrix's last input, float32 [N, I]."""
    captured: list[Tensor] = []

    def store(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        captured[:] = [inputs[0].flatten(0, -2).float()]

    with matrix.register_forward_pre_hook(store):
        yield captured
