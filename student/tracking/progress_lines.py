"""How a training shows that it moves: a line a step on a terminal, elsewhere one every half minute."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from student.loop.distiller import PARTS


class StepLines:
    """Every step's line where somebody looks on; otherwise the first step's, a heartbeat, and the last step's."""

    def __init__(self, title: str, steps: int, first_step: int, say: Callable[[str], None], every_s: float) -> None:
        self._title, self._steps, self._first_step = title, steps, first_step
        self._say, self._every_s = say, every_s
        self._started_s = time.monotonic()
        self._shown_s = float("-inf")

    def show(self, log: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Say the step, unless the line before is too fresh."""
        now_s, step = time.monotonic(), int(log["step"])
        if now_s - self._shown_s < self._every_s and step < self._steps:
            return
        self._shown_s = now_s
        left_s = (now_s - self._started_s) / max(1, step - self._first_step) * (self._steps - step)
        parts = " ".join(f"{name} {log[name]:.4f}" for name in PARTS if name in log)
        fields = [
            f"{self._title} step {step}/{self._steps}",
            f"loss {log['loss']:.4f} {parts}",
            f"norm {log['gradient_norm']:.2f}",
            f"{timing['tokens_per_s']:.0f} tokens/s",
            f"{timing['memory_bytes'] / 2**30:.2f} GiB",
            f"input wait {100 * timing['input_wait_share']:.1f} %",
            f"{duration(left_s)} left",
        ]
        self._say(" | ".join(fields))


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
