import pytest

from pipeline.config.training import DistributionSpec
from pipeline.contracts import CaptureSpec, TargetMode
from pipeline.errors import RecipeError
from student.losses.registry import REGISTRY, check_supported, comparison_warnings, get_divergence, resolve_schedules

LINEAR = (TargetMode.UNBIASED, TargetMode.SAMPLED)


@pytest.mark.parametrize("mode", list(TargetMode))
@pytest.mark.parametrize("loss", list(REGISTRY))
def test_a_divergence_is_refused_exactly_for_unsupported_modes(loss: str, mode: TargetMode) -> None:
    distribution, capture = DistributionSpec(loss=loss), CaptureSpec(mode=mode)
    if mode in LINEAR and loss != "forward_kl":
        with pytest.raises(
            RecipeError, match=f"`{loss}` cannot be computed from `{mode}` targets, only from topk, topp"
        ):
            check_supported(distribution, capture)
        with pytest.raises(RecipeError, match=loss):
            get_divergence(loss).for_mode(mode)
    else:
        check_supported(distribution, capture)
        assert callable(get_divergence(loss).for_mode(mode))


def test_an_unknown_divergence_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"got `reverse_k`, expected one of .* \(nearest: `reverse_kl`\)"):
        check_supported(DistributionSpec(loss="reverse_k"), CaptureSpec())


@pytest.mark.parametrize(
    ("temperature", "capture"),
    [
        (1.0, CaptureSpec()),
        (1.0, CaptureSpec(mode=TargetMode.SAMPLED)),
        (2.0, CaptureSpec(temperatures=(1.0, 2.0))),
        (4.0, CaptureSpec(mode=TargetMode.TOPP, temperatures=(1.0, 4.0))),
        (1.3, CaptureSpec(any_temperature=True)),
    ],
)
def test_a_temperature_with_stored_or_rebuilt_log_partitions_is_accepted(
    temperature: float, capture: CaptureSpec
) -> None:
    check_supported(DistributionSpec(temperature=temperature), capture)


@pytest.mark.parametrize(
    ("temperature", "capture", "message"),
    [
        (2.0, CaptureSpec(), r"log-partitions at 1, got 2; add it to capture\.temperatures"),
        (3.0, CaptureSpec(any_temperature=True), r"log-partitions at 1 and 1 to 2\.5, got 3"),
        (0.5, CaptureSpec(any_temperature=True), r"got 0\.5"),
        (2.0, CaptureSpec(mode=TargetMode.UNBIASED, temperatures=(1.0, 2.0)), r"expected 1 with `unbiased` targets"),
    ],
)
def test_a_temperature_without_log_partitions_is_refused(
    temperature: float, capture: CaptureSpec, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        check_supported(DistributionSpec(temperature=temperature), capture)


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        (DistributionSpec(loss="jensen_shannon", beta=0.0), "expected 0 < beta < 1, got 0"),
        (DistributionSpec(loss="jensen_shannon", beta=1.0), "use forward_kl or reverse_kl for the ends"),
        (DistributionSpec(loss="skewed_kl", skew=1.0), "use forward_kl for no skew"),
        (DistributionSpec(loss="skewed_reverse_kl", skew=0.0), "use reverse_kl for no skew"),
    ],
)
def test_beta_and_skew_at_their_limits_are_refused(distribution: DistributionSpec, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check_supported(distribution, CaptureSpec())


def test_only_the_biased_baselines_are_for_comparison_only() -> None:
    assert {name for name, entry in REGISTRY.items() if entry.comparison_only} == {
        "renormalised_kl",
        "label_residual_kl",
    }


def test_several_losses_are_checked_one_by_one() -> None:
    both = DistributionSpec(loss={"forward_kl": 0.5, "reverse_kl": 0.5})
    check_supported(both, CaptureSpec())
    with pytest.raises(RecipeError, match="`reverse_kl` cannot be computed from `unbiased`"):
        check_supported(both, CaptureSpec(mode=TargetMode.UNBIASED))
    with pytest.raises(RecipeError, match="`renormalised_kl` transforms the targets; expected it as the only loss"):
        check_supported(DistributionSpec(loss={"forward_kl": 0.5, "renormalised_kl": 0.5}), CaptureSpec())


def test_resolve_schedules_replaces_weights_by_their_value_at_the_step() -> None:
    rising = {"value": 0.5, "kind": "linear", "final": 2.0}
    moving = DistributionSpec.model_validate({"loss": {"forward_kl": 0.5, "reverse_kl": rising}})
    assert [resolve_schedules(moving, step, 2).loss for step in (0, 1)] == [
        {"forward_kl": 0.5, "reverse_kl": 0.75},
        {"forward_kl": 0.5, "reverse_kl": 1.0},
    ]
    assert resolve_schedules(DistributionSpec(), 0, 2).loss == "forward_kl"


def test_a_comparison_warning_states_the_reason() -> None:
    assert comparison_warnings(DistributionSpec(loss="renormalised_kl")) == [
        "renormalised_kl is for comparison only: its optimum is not the teacher: the head is inflated"
    ]
    assert comparison_warnings(DistributionSpec(loss="forward_kl")) == []
