"""The fused reduction in Triton: the eager one's tests in the interpreter, and on a GPU if there is one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from actors.signals.fused import is_fused
from actors.signals.reduce import eager_signals, reduce_rows
from actors.signals.rows import RowSignals
from pipeline.contracts import CaptureSpec, TargetMode

pytest.importorskip("triton", reason="triton is not installed: pip install --no-deps triton==3.7.1")
ROOT = Path(__file__).parents[3]
FUSED = "not eager and not large_vocabulary and not unbiased and not seeds and not numbers"
FUSED += " and not dtype0-topp and not dtype2-topp"


@pytest.mark.slow
def test_the_fused_reduction_passes_the_tests_of_the_eager_one_in_the_interpreter() -> None:
    # --noconftest: the conftest files import Ray and engines, which these tests do not need
    plugin = ["-m", "pytest", "--noconftest", "-p", "tests.actors.signals.interpreted"]
    command = [sys.executable, *plugin, "tests/actors/signals/test_reduce.py", "-k", FUSED]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    launched = re.search(r"chunks on the kernel: (\d+)", done.stdout)
    assert launched is not None
    assert int(launched[1]) >= 20


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from actors.signals import kernels_gpu

kernel = kernels_gpu._sum_rows
numbers = {"vocabulary": "i32", "stride": "i32", "step": "i32", "out_stride": "i32"}
flags = {"HAS_BOUNDARY": True, "HAS_SHAPE": True, "HAS_POWERS": True, "POWERS": 2, "SIZE": kernels_gpu.BLOCK}
for logits in ("*fp32", "*bf16", "*fp16"):
    arrays = {"logits": logits, "peak": "*fp32", "boundary": "*i8", "inverse": "*fp32", "out": "*fp32"}
    source = ASTSource(kernel, arrays | numbers | dict.fromkeys(flags, "constexpr"), constexprs=flags)
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""


def test_the_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [int(size) > 1000 for size in done.stdout.split()] == [True] * 3


@pytest.mark.parametrize("mode", list(TargetMode))
def test_fused_kernels_are_used_on_a_gpu_for_topk_and_topp_only(mode: TargetMode) -> None:
    spec = CaptureSpec(mode=mode)
    assert is_fused(torch.device("cuda"), torch.bfloat16, spec) == (mode in (TargetMode.TOPK, TargetMode.TOPP))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [TargetMode.TOPK, TargetMode.TOPP])
def test_both_reductions_agree_on_a_gpu(mode: TargetMode, dtype: torch.dtype) -> None:
    spec = CaptureSpec(mode=mode, temperatures=(1.0, 2.0, 1.25), any_temperature=True, boundary=True)
    generator = torch.Generator().manual_seed(0)
    logits_RV = (torch.randn(64, 50_000, generator=generator) * 3).to(dtype)
    label_R, boundary_V = torch.arange(64), torch.arange(50_000) % 3 == 0
    eager = eager_signals(logits_RV, label_R, spec, None, boundary_V)
    fused = reduce_rows(logits_RV.cuda(), label_R.cuda(), spec, None, boundary_V.cuda())
    for name in RowSignals.__dataclass_fields__:
        torch.testing.assert_close(getattr(fused, name).cpu(), getattr(eager, name), rtol=2e-5, atol=2e-5)
