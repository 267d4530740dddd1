"""Part 0: which device this is, and the versions of what runs on it."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from gpu.records import Records
from gpu.timing import copy_bytes_per_s, device, elapsed_ms

LIBRARIES = ("torch", "triton", "transformers", "numpy", "pyarrow", "numba", "pydantic", "liger-kernel", "gguf")


def run(records: Records, tiny: bool) -> None:
    """Record the card's name, memory, measured bandwidth and matrix rate, and the libraries' versions."""
    about = {"device": "cpu", "python": platform.python_version(), "versions": _versions()}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        about |= {
            "device": card.name,
            "memory_bytes": card.total_memory,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    records.card(about)
    with records.guard("bandwidth"):
        records.figure("copy on the device", "bandwidth", rate=copy_bytes_per_s(2**20 if tiny else 2**31), unit="B/s")
    with records.guard("matrix product"):
        size = 64 if tiny else 8192
        records.figure(f"{size}x{size}x{size}, bfloat16", "matrix product", rate=_flop_per_s(size), unit="FLOP/s")


def _flop_per_s(size: int) -> float:
    left, right = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
    best_ms = min(elapsed_ms(lambda: left @ right) for _ in range(6))
    return 2 * size**3 / (best_ms / 1000)


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found
