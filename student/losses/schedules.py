"""How a coefficient moves over a run."""

import math

from pipeline.config.training import Coefficient, Schedule


def coefficient_at(coefficient: Coefficient, step: int, steps: int) -> float:
    """The coefficient of step `step` (from 0) of `steps`.

    After the warm-up (a climb from 0 that reaches the peak at its last step): `constant` stays, `linear` and `cosine`
    fall to `final` * peak over all that is left, `wsd` stays at the peak and falls linearly over the last `decay`.
    """
    if isinstance(coefficient, int | float):
        return float(coefficient)
    warmup_steps = round(coefficient.warmup * steps)
    if step < warmup_steps:
        return coefficient.value * (step + 1) / warmup_steps
    fallen = _fallen(coefficient, step, steps, warmup_steps)
    return coefficient.value * (1.0 - (1.0 - coefficient.final) * fallen)


def _fallen(schedule: Schedule, step: int, steps: int, warmup_steps: int) -> float:
    """Share of the way from peak to final that is done: 0 right after the warm-up, 1 at the last step."""
    if schedule.kind == "constant":
        return 0.0
    start = max(warmup_steps, steps - round(schedule.decay * steps)) if schedule.kind == "wsd" else warmup_steps
    if step < start:
        return 0.0
    progress = min(1.0, (step - start + 1) / max(1, steps - start))
    if schedule.kind == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * progress))
    return progress
