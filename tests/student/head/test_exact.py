from collections.abc import Callable
from typing import Any

import pytest
import torch

from pipeline.config.training import DistributionSpec
from student.head.chunked import HeadSpec, head_loss
from student.head.exact import TeacherHead, exact_head_loss


def inputs_of(case: Any) -> tuple[torch.Tensor, ...]:
    return tuple(x.clone().requires_grad_() for x in (case.hidden_TD, case.weight_VD, case.bias_V))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("soft_cap", [None, 4.0])
def test_value_and_gradients_equal_the_dense_computation(
    new_case: Callable[..., Any], temperature: float, soft_cap: float | None
) -> None:
    case, teacher = new_case(), new_case(width=3, seed=9)
    head = TeacherHead(teacher.weight_VD, teacher.bias_V, scale=0.5, soft_cap=soft_cap)
    spec = HeadSpec(kd=0.7, ce=0.4, distribution=DistributionSpec(temperature=temperature))
    inputs = inputs_of(case)
    got = exact_head_loss(*inputs, teacher.hidden_TD, head, case.targets, spec, 2)
    teacher_TV = 0.5 * (teacher.hidden_TD @ teacher.weight_VD.T + teacher.bias_V)
    if soft_cap is not None:
        teacher_TV = soft_cap * torch.tanh(teacher_TV / soft_cap)
    logits_TV = inputs[0] @ inputs[1].T + inputs[2]
    p, q = torch.softmax(teacher_TV / temperature, dim=1), torch.softmax(logits_TV / temperature, dim=1)
    kd = (case.targets.weight_T * (p * (p / q).log()).sum(1)).sum()
    ce_T = torch.nn.functional.cross_entropy(logits_TV, case.targets.label_T, reduction="none")
    total = 0.7 * temperature**2 * kd + 0.4 * (case.targets.weight_T * ce_T).sum()
    torch.testing.assert_close((got.total, got.parts["kd"]), (total, kd))
    torch.testing.assert_close(torch.autograd.grad(got.total, inputs), torch.autograd.grad(total, inputs))


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_gradient_equals_finite_differences(new_case: Callable[..., Any], temperature: float) -> None:
    case, teacher = new_case(rows=3, vocabulary=7, width=2), new_case(rows=3, vocabulary=7, width=3, seed=9)
    head = TeacherHead(teacher.weight_VD, teacher.bias_V)
    spec = HeadSpec(kd=0.7, ce=0.4, distribution=DistributionSpec(temperature=temperature))
    inputs = inputs_of(case)

    @torch.no_grad()
    def total() -> float:
        return exact_head_loss(*inputs, teacher.hidden_TD, head, case.targets, spec, 2).total.item()

    loss = exact_head_loss(*inputs, teacher.hidden_TD, head, case.targets, spec, 2).total
    for leaf, gradient in zip(inputs, torch.autograd.grad(loss, inputs), strict=True):
        for at, element in enumerate(leaf.detach().view(-1).split(1)):
            values = []
            for step in (1e-6, -2e-6):
                element += step
                values.append(total())
            element += 1e-6
            assert gradient.view(-1)[at].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-7)


def test_entries_over_the_full_vocabulary_give_the_same_loss(new_case: Callable[..., Any]) -> None:
    case = new_case(vocabulary=9, k=9)
    targets = case.targets.rows_at(torch.arange(1, 7))
    full = TeacherHead(torch.eye(9, dtype=torch.float64))
    spec = HeadSpec(kd=1.0, ce=0.5)
    student = (case.hidden_TD[1:], case.weight_VD, case.bias_V)
    exact = exact_head_loss(*student, case.teacher_logprob_TV[1:], full, targets, spec, 3)
    torch.testing.assert_close(exact.total, head_loss(*student, targets, spec, 3).total)


def test_different_vocabularies_raise(new_case: Callable[..., Any]) -> None:
    case = new_case()
    head = TeacherHead(torch.zeros(24, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="got 24 for the teacher and 23 for the student"):
        exact_head_loss(*inputs_of(case), case.hidden_TD, head, case.targets, HeadSpec(), 4)
