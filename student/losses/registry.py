"""Registry of the divergences by their name in the recipe, and the check that a capture supports them."""

import difflib
import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pipeline.cache.format.temperature import MAX_TEMPERATURE, MIN_TEMPERATURE
from pipeline.config.training import DistributionSpec
from pipeline.contracts import CaptureSpec, TargetMode
from pipeline.errors import RecipeError
from student.data.targets import BUCKET_MODES, LINEAR_MODES, Targets
from student.losses.divergences.adaptive_kl import adaptive_kl
from student.losses.divergences.buckets import BucketLoss, DivergenceSettings
from student.losses.divergences.comparison import label_residual, renormalised
from student.losses.divergences.forward_kl import forward_kl, weighted_cross_entropy
from student.losses.divergences.jensen_shannon import jensen_shannon
from student.losses.divergences.reverse_kl import reverse_kl
from student.losses.divergences.skewed_kl import skewed_kl, skewed_reverse_kl
from student.losses.divergences.total_variation import total_variation
from student.losses.schedules import coefficient_at


@dataclass(frozen=True, slots=True)
class Divergence:
    """One entry of the registry."""

    bucket: BucketLoss
    """For targets with a tail bucket (`topk`, `topp`)."""
    linear: BucketLoss | None = None
    """For unbiased estimates (`unbiased`, `sampled`); None if the divergence is not linear in the target."""
    prepare_targets: Callable[[Targets], Targets] | None = None
    """Applied to the targets first."""
    comparison_only: str = ""
    """Non-empty for a biased baseline: the reason not to train with it."""

    @property
    def modes(self) -> frozenset[TargetMode]:
        """Supported target modes."""
        return BUCKET_MODES if self.linear is None else BUCKET_MODES | LINEAR_MODES

    def for_mode(self, mode: TargetMode) -> BucketLoss:
        """Return the function for targets of `mode`. Raises RecipeError for an unsupported mode."""
        function = self.linear if mode in LINEAR_MODES else self.bucket
        if function is None:
            raise RecipeError(_unsupported(self, mode))
        return function


REGISTRY: dict[str, Divergence] = {
    "forward_kl": Divergence(forward_kl, linear=weighted_cross_entropy),
    "reverse_kl": Divergence(reverse_kl),
    "jensen_shannon": Divergence(jensen_shannon),
    "skewed_kl": Divergence(skewed_kl),
    "skewed_reverse_kl": Divergence(skewed_reverse_kl),
    "adaptive_kl": Divergence(adaptive_kl),
    "total_variation": Divergence(total_variation),
    "renormalised_kl": Divergence(
        forward_kl, prepare_targets=renormalised, comparison_only="its optimum is not the teacher: the head is inflated"
    ),
    "label_residual_kl": Divergence(
        forward_kl,
        prepare_targets=label_residual,
        comparison_only="its optimum is not the teacher: the label is inflated",
    ),
}


def get_divergence(name: str) -> Divergence:
    """Return the registry's entry. Raises RecipeError with the nearest known name."""
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, n=1, cutoff=0.0)[0]
        raise RecipeError(
            f"training.distribution.loss: got `{name}`, expected one of {', '.join(REGISTRY)} (nearest: `{near}`)"
        )
    return REGISTRY[name]


def check_supported(distribution: DistributionSpec, capture: CaptureSpec) -> None:
    """Raise RecipeError if this capture does not support the output loss, or a hyperparameter is out of range."""
    for name in distribution.weights:
        entry = get_divergence(name)
        if capture.mode not in entry.modes:
            raise RecipeError(_unsupported(entry, capture.mode))
        if entry.prepare_targets and len(distribution.weights) > 1:
            raise RecipeError(
                f"training.distribution.loss: `{name}` transforms the targets; expected it as the only loss"
            )
        _check_hyperparameters(name, distribution)
    if distribution.temperature != 1.0:
        _check_temperature(distribution.temperature, capture)


def resolve_schedules(distribution: DistributionSpec, step: int, steps: int) -> DistributionSpec:
    """Return the spec with every scheduled weight replaced by its value at step `step` of `steps`."""
    if isinstance(distribution.loss, str):
        return distribution
    weights = {name: coefficient_at(weight, step, steps) for name, weight in distribution.weights.items()}
    return distribution.model_copy(update={"loss": weights})


def distillation_loss_fn(distribution: DistributionSpec, mode: TargetMode) -> Callable[[Tensor, Tensor], Tensor]:
    """Return `(student_RJ, teacher_RJ) -> loss_R`: the weighted sum of the spec's divergences for targets of `mode`.

    Raises RecipeError for an unknown name or an unsupported mode.
    """
    settings = DivergenceSettings(beta=distribution.beta, skew=distribution.skew)
    weights = distribution.weights.items()
    terms = [(get_divergence(name).for_mode(mode), coefficient_at(weight, 0, 1)) for name, weight in weights]

    def weighted_sum(student_RJ: Tensor, teacher_RJ: Tensor) -> Tensor:
        values = (function(student_RJ, teacher_RJ, settings) * weight for function, weight in terms)
        return functools.reduce(operator.add, values)

    return weighted_sum


def prepare_targets(targets: Targets, distribution: DistributionSpec) -> Targets:
    """Return the targets of the spec's divergence, transformed only for the biased baselines."""
    transform = get_divergence(next(iter(distribution.weights))).prepare_targets
    return transform(targets) if transform else targets


def comparison_warnings(distribution: DistributionSpec) -> list[str]:
    """Return one line for each biased baseline in the spec."""
    entries = {name: get_divergence(name) for name in distribution.weights}
    return [f"{name} is for comparison only: {e.comparison_only}" for name, e in entries.items() if e.comparison_only]


def _unsupported(entry: Divergence, mode: TargetMode) -> str:
    name = next(name for name, known in REGISTRY.items() if known is entry)
    supported = ", ".join(sorted(entry.modes))
    others = ", ".join(name for name, known in REGISTRY.items() if mode in known.modes)
    return (
        f"training.distribution.loss: `{name}` cannot be computed from `{mode}` targets, only from {supported}; "
        f"set capture.mode to one of these, or the loss to one that `{mode}` supports ({others})"
    )


def _check_hyperparameters(name: str, distribution: DistributionSpec) -> None:
    if name == "jensen_shannon" and not 0.0 < distribution.beta < 1.0:
        raise RecipeError(
            f"training.distribution.beta: expected 0 < beta < 1, got {distribution.beta:g}, where the divergence "
            "is 0 for every student; use forward_kl or reverse_kl for the ends"
        )
    if name.startswith("skewed") and not 0.0 < distribution.skew < 1.0:
        plain = "forward_kl" if name == "skewed_kl" else "reverse_kl"
        raise RecipeError(
            f"training.distribution.skew: expected 0 < skew < 1, got {distribution.skew:g}; use {plain} for no skew"
        )


def _check_temperature(temperature: float, capture: CaptureSpec) -> None:
    if capture.mode in LINEAR_MODES:
        raise RecipeError(
            f"training.distribution.temperature: expected 1 with `{capture.mode}` targets, which were drawn at "
            f"temperature 1, got {temperature:g}; capture topk or topp for other temperatures"
        )
    low, high = MIN_TEMPERATURE, MAX_TEMPERATURE
    if temperature in capture.temperatures or (capture.any_temperature and low <= temperature <= high):
        return
    kept = ", ".join(f"{known:g}" for known in capture.temperatures)
    rebuilt = f" and {low:g} to {high:g}" if capture.any_temperature else ""
    raise RecipeError(
        f"training.distribution.temperature: the cache has log-partitions at {kept}{rebuilt}, got {temperature:g}; "
        f"add it to capture.temperatures, or set capture.any_temperature for {low:g} to {high:g}"
    )
