"""Progress lines of a training: one per step on a terminal, otherwise one every half minute."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from student.loop.distiller import PARTS


class ProgressLines:
    """Prints a line at most every `every_s` seconds, and always for the first and the last step."""

    def __init__(
        self, title: str, steps: int, first_step: int, print_line: Callable[[str], None], every_s: float
    ) -> None:
        self._title, self._steps, self._first_step = title, steps, first_step
        self._print_line, self._every_s = print_line, every_s
        self._started_s = time.monotonic()
        self._printed_s = float("-inf")

    def show(self, log: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Print the step's line, if it is time for one."""
        now_s, step = time.monotonic(), int(log["step"])
        if now_s - self._printed_s < self._every_s and step < self._steps:
            return
        self._printed_s = now_s
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
        self._print_line(" | ".join(fields))


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`."""
    minutes, s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {s} s" if minutes else f"{s} s"
    return f"{minutes // 60} h {minutes % 60} min"
