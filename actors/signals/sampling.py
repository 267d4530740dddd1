"""Random numbers of the sampling modes: a pure function of seed, sequence id and row, in any batch, on any device.

They are drawn on the CPU, since torch's generators differ between devices: one a row in mode `unbiased`, `draws` a row
in mode `sampled`. The generator is Philox (counter-based), keyed by a hash of seed and sequence id.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import CaptureSpec, TargetMode


def draws_per_row(spec: CaptureSpec) -> int:
    """Return how many uniform numbers (U) one row needs in the spec's target mode."""
    return {TargetMode.UNBIASED: 1, TargetMode.SAMPLED: spec.draws}.get(spec.mode, 0)


def row_uniforms(spec: CaptureSpec, sequence_id: str, rows: int) -> NDArray[np.float64]:
    """Return a [T, U] array of numbers in (0, 1]. Row t does not depend on `rows`."""
    key = hashlib.sha256(f"{spec.seed}\n{sequence_id}".encode()).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return 1.0 - generator.random((rows, draws_per_row(spec)))
