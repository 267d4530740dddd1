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
    """Log-weights of the codes, [256], falling from 0."""
    values = np.zeros(LEVELS)
    for code in range(1, LEVELS):
        values[code] = values[code - 1] - step_at(values[code - 1])
    return values.astype(np.float32)


@cache
def _boundaries() -> FloatArray:
    """Negated midpoints between neighbouring levels, [255], rising."""
    values = levels()
    return (-(values[1:] + values[:-1]) / 2).astype(np.float32)


def quantise(logweight: FloatArray) -> NDArray[np.uint8]:
    """The code of the level nearest to each log-weight. Weights above 1 get code 0, below the last level the last."""
    return np.searchsorted(_boundaries(), -logweight.ravel()).astype(np.uint8).reshape(logweight.shape)
