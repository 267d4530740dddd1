"""The columns of a fused reduction's sums: x is a logit's distance from its row's largest, e = exp(x).

numba keeps compiled kernels by the date of `kernels_cpu.py` alone: touch it when a number here changes.
"""

from typing import Final

MASS: Final = 0
"""Sum of e."""
PRODUCT: Final = 1
"""Sum of e x."""
BOUNDARY: Final = 2
"""Sum of e over the tokens that start a word."""
ROOT: Final = 3
"""Sum of sqrt(e)."""
ROOT_PRODUCT: Final = 4
"""Sum of sqrt(e) x."""
POWERS: Final = 5
"""From here on, a column a temperature: sum of exp(x / T)."""
