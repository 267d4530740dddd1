"""Pytest plugin that records the outcome of each test as soon as it is known."""

import os
from pathlib import Path
from typing import Any

from gpu.records import Records


def pytest_runtest_logreport(report: Any) -> None:
    """Record a test's call, or the setup or teardown that failed or skipped it."""
    if report.when == "call" or report.outcome != "passed":
        _records().test(report.nodeid, report.outcome, report.duration, _message(report))


def pytest_collectreport(report: Any) -> None:
    """Record a file that cannot be imported as a failed test."""
    if report.failed:
        _records().test(report.nodeid, "failed", 0.0, _message(report))


def _records() -> Records:
    return Records(Path(os.environ["BENCH_GPU_RECORDS"]), "tests")


def _message(report: Any) -> str:
    if report.outcome == "passed":
        return ""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    lines = [line for line in str(report.longrepr).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("E ")]
    return " ".join((errors or lines[-1:])[:3])[:500]
