"""Chance that is a pure function: the same seed, sequence and row give the same numbers in any batch, on any device.

Numbers are drawn on the host, since generators differ between devices; a row needs one (`unbiased`) or a few dozen
(`sampled`) of them.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import CaptureSpec, TargetMode


def draws_per_row(spec: CaptureSpec) -> int:
    """How many uniform numbers a signal row consumes under the spec's target mode."""
    return {TargetMode.UNBIASED: 1, TargetMode.SAMPLED: spec.draws}.get(spec.mode, 0)


def row_uniforms(spec: CaptureSpec, sequence_id: str, rows: int) -> NDArray[np.float64]:
    """[rows, draws_per_row] numbers in (0, 1]. Row t does not depend on how many rows are asked for."""
    key = hashlib.sha256(f"{spec.seed}\n{sequence_id}".encode()).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return 1.0 - generator.random((rows, draws_per_row(spec)))
