"""Time and memory of work on a device: medians after a warm-up, with rounds that take turns between the ways."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Work = Callable[[], object]


def device() -> torch.device:
    """The first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def elapsed_ms(work: Work) -> float:
    """Milliseconds of one call from a device at rest until it rests again: by CUDA events, or by the clock."""
    synchronize()
    if not torch.cuda.is_available():
        return wall_ms(work)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def wall_ms(work: Work) -> float:
    """Milliseconds of one call by the clock: for work that the host does a part of beside the device."""
    synchronize()
    start_s = time.perf_counter()
    work()
    synchronize()
    return 1000 * (time.perf_counter() - start_s)


def interleaved_ms(
    ways: Mapping[str, Work], rounds: int, *, warm_up: int = 1, measure: Callable[[Work], float] = elapsed_ms
) -> dict[str, float]:
    """Median milliseconds of each way. Every round calls each way once, so that a change of clock rate meets all."""
    for _ in range(warm_up):
        for work in ways.values():
            work()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            found[name].append(measure(work))
    return {name: statistics.median(values) for name, values in found.items()}


def peak_bytes(work: Work) -> int:
    """Bytes that one call adds at its peak: by CUDA's allocator, or by the process' resident memory."""
    synchronize()
    if not torch.cuda.is_available():
        return _resident_peak_bytes(work)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bytes_per_s(size_bytes: int) -> float:
    """The memory's bandwidth, measured: bytes read and written by a copy on the device, per second."""
    source = torch.randint(0, 127, (size_bytes,), dtype=torch.int8, device=device())
    target = torch.empty_like(source)
    ms = interleaved_ms({"copy": lambda: target.copy_(source)}, rounds=9, warm_up=3)["copy"]
    return 2 * size_bytes / (ms / 1000)


def _resident_peak_bytes(work: Work) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    before = _status_bytes("VmRSS")
    work()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
