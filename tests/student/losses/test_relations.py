from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pipeline.config.training import RelationSpec
from pipeline.errors import RecipeError
from student.losses.relations import relation_loss, window_index


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_of(student: Tensor, teacher: Tensor, rows: Sequence[int], spec: RelationSpec, weight: Tensor) -> Tensor:
    return relation_loss(student, teacher, torch.ones(teacher.shape[1]).double(), weight, rows, spec)


def by_loops(student: Tensor, teacher: Tensor, spec: RelationSpec) -> Tensor:
    """Reference: one window with all rows, by explicit loops."""
    total = torch.zeros(()).double()
    rows = len(student)
    for t in range(rows):
        if spec.loss == "gram":
            for j in range(rows):
                cosines = [torch.dot(x[t], x[j]) / (x[t].norm() * x[j].norm()) for x in (student, teacher)]
                total += (cosines[0] - cosines[1]) ** 2 / rows
            continue
        for h in range(spec.heads):
            relations = []
            for x in (student, teacher):
                width = x.shape[1] // spec.heads
                part = x[: t + 1, h * width : (h + 1) * width]
                part = part / part.square().mean(1, keepdim=True).sqrt()
                relations.append(torch.softmax(part @ part[t] / width**0.5, dim=0))
            q, p = relations
            total += (p * (p / q).log()).sum() / spec.heads
    return total


@pytest.mark.parametrize("loss", ["similarity_kl", "gram"])
def test_one_window_equals_explicit_loops(loss: str) -> None:
    spec = RelationSpec(loss=loss, window=8, heads=2)
    student, teacher = random(5, 4), random(5, 6, seed=1)
    got = loss_of(student, teacher, [5], spec, torch.ones(5).double())
    torch.testing.assert_close(got, by_loops(student, teacher, spec))


@pytest.mark.parametrize("loss", ["similarity_kl", "gram"])
def test_gradient_equals_finite_differences(loss: str) -> None:
    spec = RelationSpec(loss=loss, window=3, heads=2)
    teacher, weight = random(7, 6, seed=1), torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0, 1.0]).double()
    assert torch.autograd.gradcheck(
        lambda s: loss_of(s, teacher, [4, 2], spec, weight), (random(7, 4).requires_grad_(),)
    )


@pytest.mark.parametrize("loss", ["similarity_kl", "gram"])
def test_packed_equals_unpacked(loss: str) -> None:
    spec = RelationSpec(loss=loss, window=4, heads=2)
    student, teacher, weight = random(11, 4), random(11, 6, seed=1), torch.rand(11).double()
    packed = loss_of(student, teacher, [6, 3], spec, weight)
    apart = sum(loss_of(student[a:b], teacher[a:b], [b - a], spec, weight[a:b]) for a, b in ((0, 6), (6, 9)))
    torch.testing.assert_close(packed, apart)


@pytest.mark.parametrize("loss", ["similarity_kl", "gram"])
def test_a_rotated_and_scaled_teacher_has_zero_loss(loss: str) -> None:
    teacher = random(6, 4, seed=1)
    rotation, _ = torch.linalg.qr(random(4, 4, seed=2))
    student = 3.0 * teacher @ rotation
    spec = RelationSpec(loss=loss, window=6, heads=1)
    assert loss_of(student, teacher, [6], spec, torch.ones(6).double()).abs() < 1e-12


def test_windows_start_at_each_sequence() -> None:
    assert window_index([3, 2], 2).tolist() == [[0, 1], [2, -1], [3, 4]]
    assert window_index([], 2).shape == (0, 2)


def test_heads_must_divide_the_width() -> None:
    spec = RelationSpec(window=4, heads=4)
    with pytest.raises(
        RecipeError, match=r"training\.relation\.heads: expected a divisor of the hidden width 6, got 4"
    ):
        loss_of(random(4, 8), random(4, 6), [4], spec, torch.ones(4).double())
