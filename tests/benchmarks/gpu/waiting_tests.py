"""Part 1: the tests that a machine without a GPU skips, each outcome kept.

Tests marked `slow` run the kernels in Triton's interpreter, which takes no GPU: `make test` runs them elsewhere. So it
does with those that compile them, which are left out at tiny sizes.
"""

import os
import subprocess
import sys
from pathlib import Path

from gpu.records import Records

ROOT = Path(__file__).resolve().parents[3]
BENCHMARKS = Path(__file__).resolve().parents[1]
TEST_FILES = {
    "tests/actors/signals/test_fused.py": ["--noconftest"],  # conftest.py above it imports ray
    "tests/student/test_head_triton.py": [],
}
"""By path from the root: options that pytest needs on a machine without Ray and vLLM."""
OPTIONS = ("-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-p", "gpu.pytest_records")
"""`addopts` is overridden because the project's own names --timeout, of a plugin that is not installed there."""


def run(records: Records, tiny: bool) -> None:
    """Run every file in a process of its own, side by side: nothing is timed here."""
    chosen = ["-k", "not compile"] if tiny else []
    processes = {file: _start(file, [*options, *chosen], records) for file, options in TEST_FILES.items()}
    for file, process in processes.items():
        with records.guard(file):
            code = process.wait()
            if code not in (0, 1):  # 1: tests failed, which their own records say
                raise RuntimeError(f"pytest: expected exit code 0 or 1, got {code}")


def _start(file: str, options: list[str], records: Records) -> "subprocess.Popen[bytes]":
    path = os.pathsep.join([str(ROOT), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "BENCH_GPU_RECORDS": str(records.path)}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *OPTIONS, *options, file]
    return subprocess.Popen(command, cwd=ROOT, env=environment)
