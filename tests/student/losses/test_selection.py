from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config.training import SelectionSpec
from pipeline.errors import RecipeError
from student.head.chunked import HeadSpec
from student.head.row_statistics import row_statistics
from student.losses.selection import PackedSequences, difference_sampling, normalized, select, top_share_weights


def chosen(case: Any, seed: int = 0, packed: PackedSequences | None = None, **selection: Any) -> Any:
    def student() -> tuple[torch.Tensor, torch.Tensor]:
        return row_statistics(case.hidden_TD, case.weight_VD, case.bias_V, case.targets, HeadSpec(), 3)

    packed = packed or PackedSequences(["only"], [case.targets.rows], seed)
    return select(case.targets, SelectionSpec(**selection), packed, student)


def test_row_statistics_equal_the_dense_computation_on_valid_rows(new_case: Callable[..., Any]) -> None:
    case = new_case()
    entropy_T, label_T = row_statistics(case.hidden_TD, case.weight_VD, case.bias_V, case.targets, HeadSpec(), 2)
    logprob_TV = torch.log_softmax(case.hidden_TD @ case.weight_VD.T + case.bias_V, dim=1)
    valid_T = case.targets.weight_T != 0
    expected = -(logprob_TV.exp() * logprob_TV).sum(1)
    torch.testing.assert_close(entropy_T[valid_T], expected[valid_T])
    torch.testing.assert_close(label_T[valid_T], logprob_TV.gather(1, case.targets.label_T[:, None])[valid_T, 0])
    assert entropy_T[~valid_T].eq(0).all()


SCORES = ["student_entropy", "ce_ratio", "teacher_entropy", "label_cost"]


@pytest.mark.parametrize("by", [*SCORES, "random"])
def test_a_share_of_the_valid_rows_is_kept_and_scaled_up(new_case: Callable[..., Any], by: str) -> None:
    case = new_case(rows=21)
    weight_T = chosen(case, by=by, share=0.25).kd_weight_T
    assert weight_T.count_nonzero() == 5
    assert weight_T[case.targets.weight_T == 0].eq(0).all()
    assert weight_T.unique().tolist() == [0.0, 4.0]


def test_student_entropy_keeps_the_rows_of_highest_entropy(new_case: Callable[..., Any]) -> None:
    case = new_case(rows=20)
    kept_T = chosen(case, by="student_entropy", share=0.3).kd_weight_T > 0
    entropy_T, _ = row_statistics(case.hidden_TD, case.weight_VD, case.bias_V, case.targets, HeadSpec(), 4)
    rest_T = ~kept_T & (case.targets.weight_T != 0)
    assert entropy_T[kept_T].min() > entropy_T[rest_T].max()


def test_ce_ratio_keeps_the_rows_with_the_highest_cross_entropy_relative_to_the_teacher(
    new_case: Callable[..., Any],
) -> None:
    case = new_case(rows=20)
    kept_T = chosen(case, by="ce_ratio", share=0.3).kd_weight_T > 0
    logprob_TV = torch.log_softmax(case.hidden_TD @ case.weight_VD.T + case.bias_V, dim=1)
    cost_T = -logprob_TV.gather(1, case.targets.label_T[:, None]).squeeze(1)
    ratio_T = cost_T / -case.targets.teacher_label_logprob_T
    rest_T = ~kept_T & (case.targets.weight_T != 0)
    assert ratio_T[kept_T].min() > ratio_T[rest_T].max()


def test_a_teacher_entropy_threshold_is_a_mask(new_case: Callable[..., Any]) -> None:
    case = new_case()
    threshold = case.targets.teacher_entropy_T.median().item()
    weight_T = chosen(case, by="teacher_entropy", threshold=threshold).kd_weight_T
    assert weight_T.tolist() == (case.targets.teacher_entropy_T >= threshold).float().tolist()


def test_random_is_a_pure_function_of_the_seed(new_case: Callable[..., Any]) -> None:
    case = new_case(rows=40)
    first, again, other = (chosen(case, by="random", share=0.5, seed=seed).kd_weight_T for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_selection_multiplies_existing_weights(new_case: Callable[..., Any]) -> None:
    case = new_case(rows=20)
    before_T = torch.rand(20)
    with_weights = replace(case, targets=replace(case.targets, kd_weight_T=before_T))
    bare_T = chosen(case, by="random", share=0.5).kd_weight_T
    torch.testing.assert_close(chosen(with_weights, by="random", share=0.5).kd_weight_T, before_T * bare_T)


def test_all_returns_the_targets_unchanged(new_case: Callable[..., Any]) -> None:
    case = new_case()
    assert chosen(case, by="all") is case.targets


def test_ties_go_to_earlier_rows_and_one_row_of_a_sequence_is_always_kept() -> None:
    counts, one = torch.tensor([False, True, True, True]), torch.zeros(4, dtype=torch.int64)
    assert top_share_weights(torch.ones(4), counts, one, 0.67).tolist() == [0.0, 1.5, 1.5, 0.0]
    assert top_share_weights(torch.ones(4), counts, one, 0.01).tolist() == [0.0, 3.0, 0.0, 0.0]
    assert not top_share_weights(torch.ones(4), torch.zeros(4, dtype=torch.bool), one, 0.5).any()
    two = torch.tensor([0, 0, 1, 1])
    assert top_share_weights(torch.tensor([1.0, 9.0, 8.0, 2.0]), ~counts | counts, two, 0.5).tolist() == [0, 2, 2, 0]


@pytest.mark.parametrize("how", ["keep", "weigh"])
@pytest.mark.parametrize("by", [*SCORES, "random"])
def test_weights_of_a_sequence_do_not_depend_on_the_packing(new_case: Callable[..., Any], by: str, how: str) -> None:
    if by == "random" and how == "weigh":
        return
    case = new_case(rows=20)
    settings = {"by": by, "how": how, "share": 0.3 if how == "keep" else 1.0}
    together = chosen(case, packed=PackedSequences(["a", "b", "c"], [9, 4, 7], 5), **settings).kd_weight_T
    apart = []
    for name, first, rows in (("a", 0, 9), ("b", 9, 4), ("c", 13, 7)):
        index = torch.arange(first, first + rows)
        one = replace(case, targets=case.targets.rows_at(index), hidden_TD=case.hidden_TD[index])
        apart.append(chosen(one, packed=PackedSequences([name], [rows], 5), **settings).kd_weight_T)
    assert torch.equal(together, torch.cat(apart))
    valid_T = case.targets.weight_T != 0
    for sums, rows in zip(together.split([9, 4, 7]), valid_T.split([9, 4, 7]), strict=True):
        assert sums.sum().item() == pytest.approx(int(rows.sum()))


def test_normalized_divides_scores_by_the_mean_of_the_sequence() -> None:
    score, counts = torch.tensor([1.0, 3.0, 9.0, 0.0, 0.0]), torch.tensor([True, True, False, True, True])
    sequence = torch.tensor([0, 0, 0, 1, 1])
    assert normalized(score, counts, sequence).tolist() == [0.5, 1.5, 0.0, 1.0, 1.0]


def test_label_cost_weighs_by_the_teachers_cross_entropy_of_the_label(new_case: Callable[..., Any]) -> None:
    case = new_case()
    weight_T = chosen(case, by="label_cost", how="weigh").kd_weight_T
    valid_T = case.targets.weight_T != 0
    cost_T = -case.targets.teacher_label_logprob_T[valid_T]
    torch.testing.assert_close(weight_T[valid_T].double(), cost_T / cost_T.mean(), rtol=1e-6, atol=0.0)


def test_difference_sampling_keeps_the_largest_mean_differences() -> None:
    teacher = [np.float32([-1, -1]), np.float32([-1, -2, -3]), np.float32([-1])]
    reference = [np.float32([-2, -2]), np.float32([-5, -5, -5]), np.float32([-1])]
    pairs = list(zip(teacher, reference, strict=True))
    assert difference_sampling(pairs, 2 / 3).tolist() == [True, True, False]
    assert difference_sampling(pairs, 1 / 3).tolist() == [False, True, False]
    assert difference_sampling([], 0.5).tolist() == []


def test_difference_sampling_refuses_pairs_of_different_length() -> None:
    one, two = np.float32([-1]), np.float32([-1, -1])
    with pytest.raises(RecipeError, match=r"sequence 1: .* got 2 of the teacher and 1 of the reference"):
        difference_sampling([(one, one), (two, one)], 0.5)
