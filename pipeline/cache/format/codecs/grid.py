"""Non-uniform quantisation of log-weights to 256 levels, with the smallest steps at the highest probabilities.

Quantising `l = log p` with a step `s` adds about `p s^2 / 24` to the KL. For a given size the best step is therefore
proportional to `p^-1/2` (minimise the sum of -log2 s under a bound on the sum of p s^2). It starts at `MIN_STEP`,
stops at `MAX_STEP` so that small weights stay accurate at higher temperatures, and grows again as `RELATIVE_STEP |l|`
where weights are negligible, so that the last level is below the smallest float32 probability.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import FloatArray

LEVELS = 256
MIN_STEP = 1 / 80
"""Step at weight 1, in nats."""
MAX_STEP = 1 / 5
"""Step from weights of about e^-5.5 down to e^-9.6, in nats."""
RELATIVE_STEP = 1 / 48
"""Step as a fraction of the log-weight's magnitude, below a log-weight of -MAX_STEP / RELATIVE_STEP."""


def step_at(logweight: float) -> float:
    """Return the distance between the levels around a log-weight, in nats."""
    return max(min(MIN_STEP * float(np.exp(-logweight / 2)), MAX_STEP), -logweight * RELATIVE_STEP)


@cache
def levels() -> FloatArray:
    """Return the log-weight of each code, [256], falling from 0; multiples of 2^-14, so any `exp` gives the same."""
    values = np.zeros(LEVELS)
    for code in range(1, LEVELS):
        values[code] = values[code - 1] - step_at(values[code - 1])
    return (np.rint(values * 2**14) / 2**14).astype(np.float32)


@cache
def cells() -> tuple[FloatArray, FloatArray]:
    """Return the smallest and largest log-weight of each code, [256] each, within float16's relative error 2^-11."""
    borders = (levels()[1:] + levels()[:-1]) / 2
    lowest = np.append(borders * (1 + 2**-11), -np.inf).astype(np.float32)
    highest = np.append(0.0, borders * (1 - 2**-11)).astype(np.float32)
    return lowest, highest


@cache
def _code_of_float16() -> NDArray[np.uint8]:
    """Return the code of every float16, [65536], indexed by its bits."""
    values = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    borders = (levels()[1:] + levels()[:-1]) / 2
    return np.searchsorted(-borders, -values).astype(np.uint8)


def quantise(logweight: FloatArray) -> NDArray[np.uint8]:
    """Return the code of the level nearest to each log-weight after rounding to float16 (relative error 2^-11).

    Weights above 1 get code 0; weights below the last level get the last code.
    """
    with np.errstate(over="ignore"):
        rounded = logweight.astype(np.float16)
    return _code_of_float16().take(rounded.view(np.uint16))
