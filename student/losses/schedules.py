"""Schedules of loss coefficients: constant, linear, cosine and warmup-stable-decay (WSD)."""

import math

from pipeline.config.training import Coefficient, Schedule


def coefficient_at(coefficient: Coefficient, step: int, steps: int) -> float:
    """Return the coefficient at step `step` (from 0) of `steps`.

    A linear warm-up from 0 reaches the peak at its last step. Then `constant` stays at the peak, `linear` and `cosine`
    go to `final` * peak over the remaining steps, and `wsd` does so linearly over the last share `decay` of all steps.
    """
    if isinstance(coefficient, int | float):
        return float(coefficient)
    warmup_steps = round(coefficient.warmup * steps)
    if step < warmup_steps:
        return coefficient.value * (step + 1) / warmup_steps
    progress = _decay_progress(coefficient, step, steps, warmup_steps)
    return coefficient.value * (1.0 - (1.0 - coefficient.final) * progress)


def _decay_progress(schedule: Schedule, step: int, steps: int, warmup_steps: int) -> float:
    """Fraction of the way from peak to final: 0 before the decay starts, 1 at the last step."""
    if schedule.kind == "constant":
        return 0.0
    start = max(warmup_steps, steps - round(schedule.decay * steps)) if schedule.kind == "wsd" else warmup_steps
    if step < start:
        return 0.0
    progress = min(1.0, (step - start + 1) / max(1, steps - start))
    if schedule.kind == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * progress))
    return progress
