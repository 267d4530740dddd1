"""Time and memory of work on a device: medians after a warm-up, over rounds that run every variant once."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Work = Callable[[], object]


def device() -> torch.device:
    """Return the first GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait until the GPU has finished, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def elapsed_ms(work: Work) -> float:
    """Return the milliseconds of one call on an idle device: by CUDA events, or by wall time on a CPU."""
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
    """Return the wall time of one call in milliseconds: for work that runs on host and device."""
    synchronize()
    start_s = time.perf_counter()
    work()
    synchronize()
    return 1000 * (time.perf_counter() - start_s)


def interleaved_ms(
    variants: Mapping[str, Work], rounds: int, *, warm_up: int = 1, measure: Callable[[Work], float] = elapsed_ms
) -> dict[str, float]:
    """Return the median milliseconds of each variant.

    Every round calls each variant once, so that a change of the clock rate affects all alike.
    """
    for _ in range(warm_up):
        for work in variants.values():
            work()
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, work in variants.items():
            found[name].append(measure(work))
    return {name: statistics.median(values) for name, values in found.items()}


def peak_bytes(work: Work) -> int:
    """Return the most bytes that one call adds: by CUDA's allocator, or by the resident memory of the process."""
    synchronize()
    if not torch.cuda.is_available():
        return _resident_peak_bytes(work)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bytes_per_s(size_bytes: int) -> float:
    """Measure the memory bandwidth: bytes read plus bytes written by a copy on the device, per second."""
    source = torch.randint(0, 127, (size_bytes,), dtype=torch.int8, device=device())
    target = torch.empty_like(source)
    ms = interleaved_ms({"copy": lambda: target.copy_(source)}, rounds=9, warm_up=3)["copy"]
    return 2 * size_bytes / (ms / 1000)


def _resident_peak_bytes(work: Work) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status_bytes("VmRSS")
    work()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
