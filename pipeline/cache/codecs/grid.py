"""The grid of log-weights: 255 levels, fine where probability is high, one byte a weight.

The error that quantising `l = log p` adds to KL is about `p * step^2 / 24`, so for a given size the best step grows as
`p^-1/2` (minimise the sum of -log2 step under a bound on the sum of p step^2): levels are even in sqrt(p). Below
`WIDEST` nat the step stays constant, so that small weights keep their meaning at higher temperatures, and below -8 it
grows as `|l| / 64`, so that the last level lies far below what float32 probabilities reach.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import FloatArray

LEVELS = 255
"""Codes 0..254 are levels by falling weight; 255 is free for the codecs that need one more symbol."""
FINEST = 0.02
"""Step at weight 1, in nats."""
WIDEST = 0.125
"""Step from where sqrt-spacing reaches it down to a weight of e^-8, in nats."""


def step_at(logweight: float) -> float:
    """Distance between the levels around that log-weight, in nats."""
    return max(min(FINEST * float(np.exp(-logweight / 2)), WIDEST), -logweight / 64)


@cache
def levels() -> FloatArray:
    """Log-weights of the codes, [255], falling from 0."""
    values = np.zeros(LEVELS)
    for code in range(1, LEVELS):
        values[code] = values[code - 1] - step_at(values[code - 1])
    return values.astype(np.float32)


@cache
def _boundaries() -> FloatArray:
    """Negated midpoints between neighbouring levels, [254], rising."""
    values = levels()
    return (-(values[1:] + values[:-1]) / 2).astype(np.float32)


def quantise(logweight: FloatArray) -> NDArray[np.uint8]:
    """The code of the level nearest to each log-weight. Weights above 1 get code 0, below the last level the last."""
    return np.searchsorted(_boundaries(), -logweight.ravel()).astype(np.uint8).reshape(logweight.shape)
