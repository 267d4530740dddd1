"""Columns of the sums [R, A] that the fused kernels return; x = logit - largest logit of the row, e = exp(x).

numba's kernel cache depends on the date of `kernels_cpu.py` only: touch that file if a number here changes.
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
"""First of C columns, one for each temperature: sum of exp(x / temperature)."""
