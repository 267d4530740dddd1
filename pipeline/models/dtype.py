"""Resolution of `dtype: auto`.

bfloat16 on a GPU, and on a CPU with AMX or AVX-512 bfloat16 instructions. float32 on other CPUs, which would emulate
bfloat16: with AVX2 only, a teacher's prefill takes six times as long.
"""

import os
from pathlib import Path
from typing import Literal

from pipeline.cache.description import read_identity
from pipeline.cache.storage.layout import CACHE_JSON
from pipeline.cache.storage.store import Store
from pipeline.config import Recipe, TeacherSpec

CPU_INFO = Path("/proc/cpuinfo")
DEVICES = Path("/dev")

_BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16"}


def resolve_dtype(teacher: TeacherSpec, recipe: Recipe | None = None) -> TeacherSpec:
    """Replace `dtype: auto` by the dtype of the teacher's existing cache, or else by the one for the hardware.

    The dtype is part of a cache's identity, so that a capture continues with it on any machine. The nodes of a cluster
    other than `local` are assumed to support bfloat16. Without a recipe, only this machine counts.
    Raises StorageError, DamageError.
    """
    if teacher.dtype != "auto":
        return teacher
    return teacher.model_copy(update={"dtype": _cache_dtype(teacher, recipe) or _hardware_dtype(teacher, recipe)})


def _cache_dtype(teacher: TeacherSpec, recipe: Recipe | None) -> str | None:
    store = None if recipe is None else Store.open(recipe.cache_uri(teacher.name))
    if store is None or not store.exists(CACHE_JSON):
        return None
    return str(read_identity(store).fields["teacher"]["dtype"])


def _hardware_dtype(teacher: TeacherSpec, recipe: Recipe | None) -> str:
    is_remote = recipe is not None and recipe.cluster.address != "local"
    return "bfloat16" if is_remote or teacher.placement.gpus or teacher.engine == "dummy" else preferred_dtype()


def preferred_dtype() -> Literal["bfloat16", "float32"]:
    """Return the dtype in which this machine computes fastest."""
    return "bfloat16" if has_gpu() or cpu_supports_bfloat16() else "float32"


def has_gpu() -> bool:
    """Return whether this machine has a visible NVIDIA GPU. Looks at device files, without torch or the driver."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and any(DEVICES.glob("nvidia[0-9]*"))


def cpu_supports_bfloat16() -> bool:
    """Return whether this machine's CPU has bfloat16 instructions."""
    try:
        flags = next(line for line in CPU_INFO.read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return False
    return not _BFLOAT16_FLAGS.isdisjoint(flags.split())
