"""A pytest plugin: the head's tests on the Triton kernels, which Triton's interpreter runs on a CPU.

TRITON_INTERPRET=1 python -m pytest -p tests.student.interpreted tests/student/test_head.py
"""

import pytest
import torch

from student import head, head_triton
from student.head_chunk import EagerSweep

BLOCK = 16
"""Small, so that rows of a few logits span several blocks."""
launched = []


class CountedSweep(head_triton.TritonSweep):
    def __init__(self, logits_CV, id_CK, temperature):
        launched.append(len(logits_CV))
        super().__init__(logits_CV, id_CK, temperature)


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    monkeypatch.setattr(head, "sweep_for", lambda device, kernel: EagerSweep if kernel == "eager" else CountedSweep)
    monkeypatch.setattr(head_triton, "BLOCK", BLOCK)
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"chunks on kernels: {len(launched)}")
