"""Properties of every divergence on random distributions; tests/student/head/test_chunked.py checks the formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from student.losses.divergences.adaptive_kl import adaptive_kl
from student.losses.divergences.buckets import ABSENT, DivergenceSettings
from student.losses.divergences.jensen_shannon import jensen_shannon
from student.losses.registry import REGISTRY

SETTINGS = DivergenceSettings(beta=0.4, skew=0.2)


def distributions(seed: int, buckets: int, peak: float = 2.0) -> tuple[Tensor, Tensor]:
    """(student, teacher) of 6 rows; the teacher's entries fall."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.log_softmax(peak * torch.randn(6, buckets, generator=g, dtype=torch.float64), dim=1) for _ in range(2)
    )
    teacher[:, :-1] = teacher[:, :-1].sort(dim=1, descending=True).values
    return student, teacher


@given(seed=st.integers(0, 10**6), buckets=st.integers(2, 40), name=st.sampled_from(list(REGISTRY)))
def test_a_divergence_is_zero_at_the_teacher_and_never_negative(seed: int, buckets: int, name: str) -> None:
    student, teacher = distributions(seed, buckets, peak=1.0)
    loss = REGISTRY[name].bucket
    assert (loss(student, teacher, SETTINGS) >= -1e-12).all()
    leaf = teacher.clone().requires_grad_()
    at_teacher = loss(leaf, teacher, SETTINGS)
    assert at_teacher.abs().max() < 1e-12
    gradient = torch.autograd.grad(at_teacher.sum(), leaf)[0]
    tangent = gradient - teacher.exp() * gradient.sum(dim=1, keepdim=True)
    if name != "total_variation":
        assert tangent.abs().max() < 1e-9


@pytest.mark.parametrize("name", list(REGISTRY))
def test_padding_changes_neither_value_nor_gradient(name: str) -> None:
    student, teacher = distributions(3, 5)
    wide_student, wide_teacher = (
        torch.cat([x[:, :-1], torch.full((6, 2), ABSENT).double(), x[:, -1:]], dim=1) for x in (student, teacher)
    )
    results = []
    for left, right in ((student, teacher), (wide_student, wide_teacher)):
        leaf = left.clone().requires_grad_()
        value = REGISTRY[name].bucket(leaf, right, SETTINGS)
        results.append((value, torch.autograd.grad(value.sum(), leaf)[0]))
    (value, gradient), (wide_value, wide_gradient) = results
    torch.testing.assert_close(wide_value, value)
    torch.testing.assert_close(wide_gradient[:, [0, 1, 2, 3, 6]], gradient)
    assert wide_gradient[:, 4:6].eq(0).all()


@pytest.mark.parametrize("name", list(REGISTRY))
def test_value_and_gradient_are_finite_if_one_side_has_no_mass(name: str) -> None:
    student, teacher = distributions(4, 5)
    teacher[0, -1], student[1, -1], student[2, 0] = ABSENT, -87.0, -200.0
    leaf = student.requires_grad_()
    value = REGISTRY[name].bucket(leaf, teacher, SETTINGS)
    assert value.isfinite().all()
    assert torch.autograd.grad(value.sum(), leaf)[0].isfinite().all()


def test_jensen_shannon_is_bounded_and_symmetric_at_one_half() -> None:
    student, teacher = distributions(5, 9, peak=30.0)
    half = DivergenceSettings(beta=0.5)
    value = jensen_shannon(student, teacher, half)
    assert (value <= np.log(2) + 1e-12).all()
    torch.testing.assert_close(value, jensen_shannon(teacher, student, half))


def test_adaptive_kl_weighs_by_the_gaps_in_head_and_rest() -> None:
    teacher = torch.tensor([[0.4, 0.3, 0.1, 0.2]]).double().log()
    student = torch.tensor([[0.2, 0.3, 0.2, 0.3]]).double().log()
    p, q = teacher.exp(), student.exp()
    head, rest = 0.2 + 0.0, 0.1 + 0.1
    forward, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    expected = (head * forward + rest * reverse) / (head + rest)
    leaf = student.requires_grad_()
    got = adaptive_kl(leaf, teacher, SETTINGS)
    torch.testing.assert_close(got, expected[None].detach())
    gradient = torch.autograd.grad(got.sum(), leaf)[0]
    by_forward, by_reverse = -p, q * ((q / p).log() + 1)
    torch.testing.assert_close(gradient, ((head * by_forward + rest * by_reverse) / (head + rest)).detach())


def test_adaptive_kl_is_zero_for_equal_distributions() -> None:
    _, teacher = distributions(6, 4)
    assert adaptive_kl(teacher, teacher, SETTINGS).abs().max() < 1e-12
