"""Named places where a test can make a training process die.

`STILLHOUSE_TRAIN_FAULT="point:step:rank:flag"` kills (SIGKILL) the process of that rank when it reaches that point in
that step, once: the file `flag` is created first, and a process that finds it there goes on. Several are separated by
spaces.
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
"""The step is the one that is trained; from `mid_checkpoint` on, the number of steps that are done or saved."""
POINTS: tuple[Point, ...] = get_args(Point)
ENVIRONMENT_KEY = "STILLHOUSE_TRAIN_FAULT"


def fault_point(point: Point, step: int, rank: int) -> None:
    """Say that `rank` is at `point` of `step`. UsageError where the hook's setting makes no sense."""
    for setting in os.environ.get(ENVIRONMENT_KEY, "").split():
        _act(setting, point, step, rank)


def _act(setting: str, point: Point, step: int, rank: int) -> None:
    wanted, at_step, at_rank, flag = (*setting.split(":", 3), "", "", "")[:4]
    if wanted not in POINTS or not at_step.isdigit() or not at_rank.isdigit() or not flag:
        raise UsageError(
            f"{ENVIRONMENT_KEY}={setting!r}: expected point:step:rank:flag, a point of {', '.join(POINTS)}"
        )
    if (wanted, int(at_step), int(at_rank)) != (point, step, rank) or Path(flag).exists():
        return
    Path(flag).touch()
    os.kill(os.getpid(), signal.SIGKILL)
