import pytest
import torch

from pipeline.errors import RecipeError
from student.losses.features import Projections, channel_rms, feature_loss, match_layers


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mse_is_the_mean_over_channels_of_scaled_differences_summed_over_weighted_rows() -> None:
    student, teacher, projection, weight = random(3, 4), random(3, 6, seed=1), random(6, 4, seed=2), torch.rand(3)
    rms = random(6, seed=3).abs() + 0.5
    expected = 0.0
    for row in range(3):
        gap = (projection @ student[row] - teacher[row]) / rms
        expected += weight[row] * (gap * gap).sum() / 6
    torch.testing.assert_close(feature_loss(student, teacher, projection, rms, weight.double(), "mse"), expected)


def test_cosine_does_not_depend_on_the_norm_of_either_side() -> None:
    student, teacher, weight = random(3, 4), random(3, 4, seed=1), torch.ones(3, dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.float64)
    loss = feature_loss(student, teacher, None, ones, weight, "cosine")
    torch.testing.assert_close(feature_loss(5.0 * student, 0.1 * teacher, None, ones, weight, "cosine"), loss)
    by_hand = sum(1 - s @ t / (s.norm() * t.norm()) for s, t in zip(student, teacher, strict=True))
    torch.testing.assert_close(loss, by_hand)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_gradient_equals_finite_differences(kind: str) -> None:
    student, projection = random(3, 2).requires_grad_(), random(4, 2, seed=2).requires_grad_()
    teacher, rms, weight = random(3, 4, seed=1), random(4, seed=3).abs() + 0.5, torch.tensor([1.0, 0.0, 2.0]).double()
    assert torch.autograd.gradcheck(lambda s, p: feature_loss(s, teacher, p, rms, weight, kind), (student, projection))


def test_an_outlier_channel_does_not_dominate() -> None:
    teacher = random(200, 5)
    teacher[:, 0] *= 1000.0
    rms = channel_rms(teacher)
    torch.testing.assert_close((teacher / rms).square().mean(dim=0), torch.ones(5).double(), rtol=1e-5, atol=1e-5)
    weight = torch.ones(200).double()
    zero = torch.zeros(200, 5).double()
    torch.testing.assert_close(feature_loss(zero, teacher, None, rms, weight, "mse").item(), 200.0, rtol=1e-4, atol=0)


def test_rows_of_weight_zero_may_contain_nan() -> None:
    student = random(2, 4)
    student[0] = torch.nan
    weight = torch.tensor([0.0, 1.0]).double()
    loss = feature_loss(student, random(2, 4, seed=1), None, torch.ones(4).double(), weight, "mse")
    assert loss.isfinite()


def test_channel_rms_needs_a_row() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        channel_rms(torch.zeros(0, 5))


def test_projections_are_one_map_per_layer() -> None:
    maps = Projections([2, -1], student_width=3, teacher_width=5)
    assert {name: tuple(p.shape) for name, p in maps.named_parameters()} == {
        "maps.2.weight": (5, 3),
        "maps.-1.weight": (5, 3),
    }
    assert maps.weight_ED(-1) is maps.maps["-1"].weight


@pytest.mark.parametrize(
    ("captured", "expected"),
    [([15, -1], {5: 15, -1: -1}), ([0, 10, 20, 30], {0: 0, 3: 10, 7: 20, 10: 30}), ([14, 15, 16], {5: 16})],
)
def test_layers_are_matched_in_proportion_to_depth(captured: list[int], expected: dict[int, int]) -> None:
    assert match_layers(10, 30, captured) == expected


@pytest.mark.parametrize(
    ("inherited", "captured", "expected"),
    [
        ([*range(12), *range(20, 30)], [20, 25, -1], {12: 20, 17: 25, -1: -1}),
        ([0, 3, 5], [0, 1, 4, 6], {0: 0, 1: 1, 2: 4, 3: 6}),
        ([0, 3, 5], [2, 3], {1: 3}),
    ],
)
def test_a_state_is_matched_by_the_inherited_layers_below_it(inherited, captured, expected) -> None:
    assert match_layers(len(inherited), 30, captured, inherited=inherited) == expected


def test_an_explicit_map_is_checked_and_returned() -> None:
    assert match_layers(10, 30, [3, -1], {4: 3}) == {4: 3}
    with pytest.raises(RecipeError, match=r"teacher layer 5 was not captured, only \[-1, 3\]"):
        match_layers(10, 30, [3, -1], {4: 5})
    with pytest.raises(RecipeError, match="expected student layers -1 to 10, got 11"):
        match_layers(10, 30, [3, -1], {11: 3})
    with pytest.raises(RecipeError, match=r"set capture\.hidden_layers"):
        match_layers(10, 30, [])
