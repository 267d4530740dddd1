from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.contracts import TargetMode
from pipeline.errors import RecipeError
from student.data.targets import log1mexp


def test_entries_and_tail_at_a_temperature_equal_the_tempered_softmax(new_case: Callable[..., Any]) -> None:
    case = new_case(temperature=1.6)
    got = case.targets.at_temperature(1.6)
    tempered_TV = torch.log_softmax(case.teacher_logprob_TV / 1.6, dim=1)
    kept_TK = case.targets.entry_logweight_TK.isfinite()
    expected_TK = tempered_TV.gather(1, case.targets.entry_id_TK).masked_fill(~kept_TK, -torch.inf)
    torch.testing.assert_close(got.entry_logweight_TK, expected_TK)
    torch.testing.assert_close(got.tail_logmass_T.exp(), 1 - expected_TK.exp().sum(1))
    assert got.temperature == 1.6
    assert got.at_temperature(1.6) is got


def test_a_rounded_log_partition_gives_an_empty_tail_instead_of_nan(new_case: Callable[..., Any]) -> None:
    targets = new_case(temperature=2.0).targets
    too_small = replace(targets, log_partition_T=torch.logsumexp(targets.entry_logweight_TK / 2, dim=1) - 1e-3)
    assert too_small.at_temperature(2.0).tail_logmass_T.eq(-torch.inf).all()


@pytest.mark.parametrize(
    "change", [{"log_partition_T": None}, {"mode": TargetMode.UNBIASED}, {"mode": TargetMode.SAMPLED}]
)
def test_a_temperature_without_a_log_partition_is_refused(new_case: Callable[..., Any], change: dict[str, Any]) -> None:
    targets = replace(new_case(temperature=2.0).targets, **change)
    assert targets.at_temperature(1.0) is targets
    with pytest.raises(RecipeError, match=r"temperature: got 2, but these `.*` targets are at 1"):
        targets.at_temperature(2.0)


@settings(deadline=None)
@given(st.floats(-200, -1e-100))
def test_log1mexp_keeps_its_precision_at_both_ends(x: float) -> None:
    with localcontext() as context:
        context.prec = 220
        exact = float((1 - Decimal(x).exp()).ln())
    assert log1mexp(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(exact, rel=1e-12)


def test_log1mexp_at_its_limits() -> None:
    assert log1mexp(torch.zeros(())) == -torch.inf
    assert log1mexp(torch.tensor(-torch.inf)) == 0.0


def test_rows_at_and_to_change_only_tensors(new_case: Callable[..., Any]) -> None:
    targets = new_case().targets
    some = targets.rows_at(torch.tensor([4, 1]))
    assert some.rows == 2
    assert torch.equal(some.entry_id_TK, targets.entry_id_TK[[4, 1]])
    assert some.mode is targets.mode
    assert some.kd_weight_T is None
    assert targets.to("cpu").label_T.equal(targets.label_T)


def test_output_weight_is_the_product_of_row_and_selection_weights(new_case: Callable[..., Any]) -> None:
    targets = new_case().targets
    assert targets.output_weight is targets.weight_T
    half = replace(targets, kd_weight_T=torch.full((7,), 0.5))
    torch.testing.assert_close(half.output_weight, 0.5 * targets.weight_T)
