"""Part `device`: name and versions, and the two rates that limit every other part: memory bandwidth, matrix product."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

from gpu.records import Records

LIBRARIES = ("torch", "triton", "transformers", "numpy", "pyarrow", "numba", "pydantic", "ml-dtypes", "liger-kernel")


def run(records: Records, tiny: bool) -> None:
    """Record names and versions first, since importing torch may take long; then measure."""
    records.device({"python": platform.python_version(), "versions": _versions(), **_name_and_driver()})
    import torch

    from gpu.timing import copy_bytes_per_s, device, interleaved_ms

    records.device(_properties())
    with records.catch_failure("bandwidth"):
        records.figure("copy on the device", "bandwidth", rate=copy_bytes_per_s(2**20 if tiny else 2**31), unit="B/s")
    with records.catch_failure("matrix product"):
        size = 64 if tiny else 8192
        left, right = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
        ms = interleaved_ms({"product": lambda: left @ right}, rounds=5)["product"]
        rate = 2 * size**3 / (ms / 1000)
        records.figure(f"{size}x{size}x{size}, bfloat16", "matrix product", ms=ms, rate=rate, unit="FLOP/s")


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def _name_and_driver() -> dict[str, str]:
    """Return the first GPU and its driver as nvidia-smi prints them; empty without a GPU."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
        name, driver = lines[0].split(", ")
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return {}
    return {"device": name, "driver": driver}


def _properties() -> dict[str, object]:
    import torch

    if not torch.cuda.is_available():
        return {"device": "cpu"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }
