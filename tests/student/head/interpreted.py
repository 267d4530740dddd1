"""A pytest plugin that runs the head's tests on the Triton kernels in Triton's interpreter, on a CPU.

TRITON_INTERPRET=1 python -m pytest -p tests.student.head.interpreted tests/student/head/test_chunked.py
"""

import pytest
import torch

from student.head import chunked, triton_kernel
from student.head.chunk import EagerLogitsKernel

BLOCK = 16
"""Small, so that rows of a few logits span several blocks."""
launched = []


class CountedLogitsKernel(triton_kernel.TritonLogitsKernel):
    def __init__(self, logits_RV, id_RK, temperature):
        launched.append(len(logits_RV))
        super().__init__(logits_RV, id_RK, temperature)


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    monkeypatch.setattr(
        chunked,
        "logits_kernel_for",
        lambda device, kernel: EagerLogitsKernel if kernel == "eager" else CountedLogitsKernel,
    )
    monkeypatch.setattr(triton_kernel, "BLOCK", BLOCK)
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"chunks on kernels: {len(launched)}")
