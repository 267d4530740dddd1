"""Which numbers a model computes with, where the recipe leaves it to the machine (`dtype: auto`).

bfloat16 where the hardware multiplies it: a GPU, or a CPU with AMX tiles or AVX-512's bfloat16 instructions. float32
elsewhere, where bfloat16 is emulated: on a CPU with AVX2 alone a teacher's prefill then takes six times as long.
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

_MULTIPLIES = {"amx_bf16", "avx512_bf16"}


def resolve_dtype(teacher: TeacherSpec, recipe: Recipe | None = None) -> TeacherSpec:
    """The teacher with `dtype: auto` replaced by what its cache began with, or by what suits the hardware.

    What was settled is part of the cache's identity, so one that has begun keeps it, whichever machine goes on with it.
    A cluster elsewhere is taken to have hardware for bfloat16. Without a recipe this machine alone decides.
    Raises StorageError, DamageError.
    """
    if teacher.dtype != "auto":
        return teacher
    return teacher.model_copy(update={"dtype": _began_with(teacher, recipe) or _suited(teacher, recipe)})


def _began_with(teacher: TeacherSpec, recipe: Recipe | None) -> str | None:
    store = None if recipe is None else Store.open(recipe.cache_uri(teacher.name))
    if store is None or not store.exists(CACHE_JSON):
        return None
    return str(read_identity(store).fields["teacher"]["dtype"])


def _suited(teacher: TeacherSpec, recipe: Recipe | None) -> str:
    elsewhere = recipe is not None and recipe.cluster.address != "local"
    return "bfloat16" if elsewhere or teacher.placement.gpus or teacher.engine == "dummy" else preferred_dtype()


def preferred_dtype() -> Literal["bfloat16", "float32"]:
    """What this machine computes with at its best."""
    return "bfloat16" if has_gpu() or cpu_supports_bfloat16() else "float32"


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU that is not hidden from us. Asks no driver: torch is not loaded yet."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and any(DEVICES.glob("nvidia[0-9]*"))


def cpu_supports_bfloat16() -> bool:
    """Whether this machine's processor has instructions that multiply bfloat16."""
    try:
        flags = next(line for line in CPU_INFO.read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return False
    return not _MULTIPLIES.isdisjoint(flags.split())
