"""Named points in a writer at which a test can inject a fault.

`STILLHOUSE_FAULT="point:unit:action"` acts when that point is reached for that unit; `*` matches any unit. Actions:
`kill` (SIGKILL), `stop` (SIGSTOP), `exit` (status 70). Unset, a point costs one lookup in the environment.
"""

import os
import signal
from typing import Literal, TypeAlias, get_args

from pipeline.errors import UsageError

Point: TypeAlias = Literal[
    "before_write", "mid_write", "after_write", "before_commit", "after_commit", "before_manifest"
]
POINTS: tuple[Point, ...] = get_args(Point)
ENVIRONMENT_KEY = "STILLHOUSE_FAULT"

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def fault_point(point: Point, unit_id: str) -> None:
    """Inject the fault that the environment sets for this point and unit, if any. Raises UsageError if malformed."""
    setting = os.environ.get(ENVIRONMENT_KEY)
    if not setting:
        return
    parts = setting.split(":")
    if len(parts) != 3 or parts[0] not in POINTS or parts[2] not in {*_SIGNALS, "exit"}:
        raise UsageError(f"{ENVIRONMENT_KEY}={setting!r}: expected point:unit:action, a point of {', '.join(POINTS)}")
    if parts[0] != point or parts[1] not in ("*", unit_id):
        return
    if parts[2] == "exit":
        os._exit(70)
    os.kill(os.getpid(), _SIGNALS[parts[2]])
