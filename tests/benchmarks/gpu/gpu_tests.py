"""Part `tests`: the tests that are skipped without a GPU, with the outcome of each.

Left out are tests marked `slow`, which run the kernels in Triton's interpreter and need no GPU, and at tiny sizes those
that compile kernels: `make test` runs both.
"""

import os
import subprocess
import sys
from pathlib import Path

from gpu.records import Records

ROOT = Path(__file__).resolve().parents[3]
BENCHMARKS = Path(__file__).resolve().parents[1]
TEST_FILES = {
    "tests/actors/signals/test_fused.py": ["--noconftest"],  # tests/actors/conftest.py imports ray
    "tests/student/head/test_triton_kernel.py": [],
}
"""By path from the root: options that pytest needs where Ray and vLLM are not installed."""
OPTIONS = ("-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-p", "gpu.pytest_plugin")
"""`addopts` is replaced because the project's own has --timeout, an option of a plugin that may not be installed."""


def run(records: Records, tiny: bool) -> None:
    """Run each file in a process of its own, at the same time: the tests measure no time."""
    selection = ["-k", "not compile"] if tiny else []
    processes = {file: _start(file, [*options, *selection], records) for file, options in TEST_FILES.items()}
    for file, process in processes.items():
        with records.catch_failure(file):
            code = process.wait()
            if code not in (0, 1):  # 1: tests failed, which the plugin has recorded
                raise RuntimeError(f"pytest: expected exit code 0 or 1, got {code}")


def _start(file: str, options: list[str], records: Records) -> "subprocess.Popen[bytes]":
    path = os.pathsep.join([str(ROOT), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "BENCH_GPU_RECORDS": str(records.path)}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *OPTIONS, *options, file]
    return subprocess.Popen(command, cwd=ROOT, env=environment)
