"""Fault injection for tests: named points at which a training process can be killed.

`STILLHOUSE_TRAIN_FAULT="point:step:rank:flag"` sends SIGKILL to the process of that rank when it reaches that point in
that step, once: the file `flag` is created first, and nothing happens where it exists. Several settings are separated
by spaces.
"""

import os
import signal
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from pipeline.errors import UsageError

Point: TypeAlias = Literal[
    "before_step",
    "mid_step",
    "after_step",
    "mid_checkpoint",
    "before_marker",
    "after_marker",
    "mid_resume",
    "mid_final",
    "before_record",
    "after_record",
    "mid_clear",
]
"""In the first three, `step` is the number of the current step, from 0; in the others, the number of finished steps."""
POINTS: tuple[Point, ...] = get_args(Point)
ENVIRONMENT_KEY = "STILLHOUSE_TRAIN_FAULT"


def fault_point(point: Point, step: int, rank: int) -> None:
    """Kill this process if the environment names this point, step and rank. Raises UsageError for a bad setting."""
    for setting in os.environ.get(ENVIRONMENT_KEY, "").split():
        name, at_step, at_rank, flag = (*setting.split(":", 3), "", "", "")[:4]
        if name not in POINTS or not at_step.isdigit() or not at_rank.isdigit() or not flag:
            raise UsageError(
                f"{ENVIRONMENT_KEY}={setting!r}: expected point:step:rank:flag, a point of {', '.join(POINTS)}"
            )
        if (name, int(at_step), int(at_rank)) == (point, step, rank) and not Path(flag).exists():
            Path(flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
