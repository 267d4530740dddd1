"""Pytest plugin: runs the eager reduction's tests on the fused one, in Triton's interpreter on a CPU.

TRITON_INTERPRET=1 python -m pytest -p tests.actors.signals.interpreted tests/actors/signals/test_reduce.py
"""

import pytest
import torch
from triton import next_power_of_2

from actors.signals import fused, kernels_gpu, reduce
from pipeline.contracts import TargetMode

launched = []


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    kernel = fused.fused_signals

    def counted(logits_RV, *rest):
        launched.append(len(logits_RV))
        # Every row has three or four blocks, the last not full. The interpreter is as fast with small blocks.
        monkeypatch.setattr(kernels_gpu, "BLOCK", next_power_of_2(logits_RV.shape[1]) // 4)
        before_RV = logits_RV.clone()
        signals = kernel(logits_RV, *rest)
        assert torch.equal(logits_RV, before_RV), "the logits were not restored"
        return signals

    monkeypatch.setattr(reduce, "is_fused", lambda device, dtype, spec: spec.mode in (TargetMode.TOPK, TargetMode.TOPP))
    monkeypatch.setattr(reduce, "fused_signals", counted)
    monkeypatch.setattr(fused, "kernels", lambda device: kernels_gpu)
    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"chunks on the kernel: {len(launched)}")
