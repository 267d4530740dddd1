"""The Triton kernels: the tests of test_chunked.py in Triton's interpreter, and on a GPU where there is one."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from student.head.chunk import EagerLogitsKernel
from student.head.chunked import HeadSpec, head_loss, logits_kernel_for

pytest.importorskip("triton", reason="triton is not installed: pip install --no-deps triton==3.7.1")
ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_interpreted_kernels_pass_the_tests_of_the_chunked_head() -> None:
    command = [
        sys.executable,
        *["-m", "pytest", "-p", "tests.student.head.interpreted", "tests/student/head/test_chunked.py"],
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-k", "not real_vocabulary and not on_average"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    launched = re.search(r"chunks on kernels: (\d+)", done.stdout)
    assert launched is not None
    assert int(launched[1]) > 100


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from student.head import triton_kernel

numbers = {"vocabulary": "i32", "stride": "i32", "TEMPERATURE": "constexpr", "SIZE": "constexpr"}
for kernel in (triton_kernel._read_rows, triton_kernel._write_rows):
    signature = {name: "*fp32" for name in kernel.arg_names[:4]} | numbers
    source = ASTSource(kernel, signature, constexprs={"TEMPERATURE": 2.0, "SIZE": triton_kernel.BLOCK})
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [int(size) > 1000 for size in done.stdout.split()] == [True, True]


def test_auto_takes_triton_on_a_gpu_only_and_a_named_kernel_is_taken_anywhere() -> None:
    from student.head.triton_kernel import TritonLogitsKernel

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert logits_kernel_for(cpu, "auto") is EagerLogitsKernel
    assert logits_kernel_for(gpu, "auto") is TritonLogitsKernel
    assert logits_kernel_for(gpu, "eager") is EagerLogitsKernel
    assert logits_kernel_for(cpu, "triton") is TritonLogitsKernel


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the kernels are tested in the interpreter only")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_eager_and_triton_kernels_agree_on_a_gpu(new_case: Callable[..., Any], temperature: float) -> None:
    case = new_case(rows=64, vocabulary=50_000, width=32, k=16, temperature=temperature)
    results = []
    for kernel in ("eager", "triton"):
        inputs = [x.cuda().requires_grad_() for x in (case.hidden_TD, case.weight_VD, case.bias_V)]
        spec = HeadSpec(kd=0.7, ce=0.4, kernel=kernel)
        spec = replace(spec, distribution=spec.distribution.model_copy(update={"temperature": temperature}))
        total = head_loss(*inputs, case.targets.to("cuda"), spec, 24).total
        results.append([total, *torch.autograd.grad(total, inputs)])
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-7, atol=1e-9)
