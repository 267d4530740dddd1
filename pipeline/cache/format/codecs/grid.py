"""The grid of log-weights: 256 levels, fine where probability is high.

The error that quantising `l = log p` adds to KL is about `p * step^2 / 24`, so for a given size the best step grows as
`p^-1/2` (minimise the sum of -log2 step under a bound on the sum of p step^2). It starts at `FINEST`, stops growing
at `WIDEST` so that small weights keep their meaning at higher temperatures, and grows again as `|l| / DEPTH` where
weights are too small to matter, so that the last level lies below what probabilities in float32 reach.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import FloatArray

LEVELS = 256
FINEST = 1 / 80
"""Step at weight 1, in nats."""
WIDEST = 1 / 5
"""Step from weights of about e^-5.5 down to e^-9.6, in nats."""
DEPTH = 48
"""Below a log-weight of -WIDEST * DEPTH the step is the log-weight's magnitude over this."""


def step_at(logweight: float) -> float:
    """Distance between the levels around that log-weight, in nats."""
    return max(min(FINEST * float(np.exp(-logweight / 2)), WIDEST), -logweight / DEPTH)


@cache
def levels() -> FloatArray:
    """Log-weights of the codes, [256], falling from 0. Multiples of 2^-14: the same under any library's `exp`."""
    values = np.zeros(LEVELS)
    for code in range(1, LEVELS):
        values[code] = values[code - 1] - step_at(values[code - 1])
    return (np.rint(values * 2**14) / 2**14).astype(np.float32)


@cache
def cells() -> tuple[FloatArray, FloatArray]:
    """The least and the most log-weight that gets each code, [256] each: float16 moves a border by 2^-11 of it."""
    borders = (levels()[1:] + levels()[:-1]) / 2
    least = np.append(borders * (1 + 2**-11), -np.inf).astype(np.float32)
    most = np.append(0.0, borders * (1 - 2**-11)).astype(np.float32)
    return least, most


@cache
def _code_of_half() -> NDArray[np.uint8]:
    """The code of every float16, by its bits."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    boundaries = (levels()[1:] + levels()[:-1]) / 2
    return np.searchsorted(-boundaries, -halves).astype(np.uint8)


def quantise(logweight: FloatArray) -> NDArray[np.uint8]:
    """The code of the level nearest to each log-weight's float16, which is 2^-11 of it away at most.

    Weights above 1 get code 0, those below the last level the last.
    """
    with np.errstate(over="ignore"):
        halves = logweight.astype(np.float16)
    return _code_of_half().take(halves.view(np.uint16))
