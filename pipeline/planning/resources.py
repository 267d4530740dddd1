"""Resources that replicas ask Ray for, and those of this machine. Does not import Ray."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

import psutil

from pipeline.config import ClusterSpec, TeacherSpec
from pipeline.errors import RecipeError

ALL_GPUS_WITHOUT_ANY = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
"""Ray's variable for actors that request no GPU. `1`: they see none. `0`: they see every GPU of their node."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Resource request of one replica."""

    cpus: float
    gpus: float
    resources: dict[str, float] = field(default_factory=dict)
    label_selector: dict[str, str] = field(default_factory=dict)
    bundles: tuple[dict[str, float], ...] = ()
    """Bundles of a placement group, the actor in the first; empty: an actor without a placement group."""
    strategy: str = "PACK"
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the replica's processes."""

    @property
    def total(self) -> dict[str, float]:
        """Total request of one replica, by Ray's resource names."""
        asked = self.bundles or ({"CPU": self.cpus, "GPU": self.gpus, **self.resources},)
        names = {name for bundle in asked for name in bundle}
        summed = {name: sum(bundle.get(name, 0.0) for bundle in asked) for name in sorted(names)}
        return {name: amount for name, amount in summed.items() if amount > 0}


def placement_for(teacher: TeacherSpec, cluster: Mapping[str, float]) -> Placement:
    """Resource request of one replica of the teacher on a cluster with these total resources."""
    asked = teacher.placement
    gpus = asked.gpus if asked.gpus is not None else float(teacher.engine != "dummy" and cluster.get("GPU", 0) > 0)
    if teacher.ranks == 1 or gpus == 0:
        # Without a GPU of its own a replica must not see those of its node: its engine would use them.
        unseen = {ALL_GPUS_WITHOUT_ANY: "1"} if gpus == 0 and cluster.get("GPU", 0) > 0 else {}
        labels = dict(asked.label_selector)
        return Placement(asked.cpus * teacher.ranks, gpus, dict(asked.resources), labels, environment=unseen)
    bundle = {"CPU": asked.cpus, "GPU": gpus, **asked.resources}
    return Placement(
        cpus=0.0,
        gpus=0.0,
        label_selector=dict(asked.label_selector),
        bundles=(bundle,) * teacher.ranks,
        strategy="STRICT_PACK" if teacher.pipeline_parallel == 1 else "PACK",
        # The actor requests no GPU, but vLLM must see the GPUs of its node before it starts its ranks.
        environment={ALL_GPUS_WITHOUT_ANY: "0"},
    )


def check_fits(teacher: TeacherSpec, placement: Placement, cluster: Mapping[str, float]) -> None:
    """Raise RecipeError where not one replica fits into a cluster that does not scale."""
    for name, amount in placement.total.items():
        if amount > cluster.get(name, 0.0):
            raise RecipeError(
                f"teacher {teacher.name}: one replica asks for {amount:g} {name}, expected at most "
                f"{cluster.get(name, 0.0):g} (the total of this cluster); see teachers.placement and cluster.cpus"
            )


def replicas_that_fit(placement: Placement, cluster: Mapping[str, float]) -> int:
    """Replicas that fit into an idle cluster, at least one."""
    limits = (int(cluster.get(name, 0.0) // amount) for name, amount in placement.total.items())
    return max(1, min(limits, default=1))


def is_idle(placement: Placement, cluster: Mapping[str, float], available: Mapping[str, float]) -> bool:
    """Whether the cluster has everything that one replica requests and all of it is free.

    Free amounts alone are not enough: they may be on different nodes, or belong to a replica that is just starting.
    """
    return all(
        available.get(name, 0.0) >= max(amount, cluster.get(name, 0.0)) for name, amount in placement.total.items()
    )


def concurrent_replicas(
    placements: Mapping[str, Placement], most: Mapping[str, int], cluster: Mapping[str, float]
) -> dict[str, int]:
    """Replicas of each teacher that run at the same time, placed in turn until nothing fits or `most` is reached."""
    running = dict.fromkeys(placements, 0)
    left = dict(cluster)
    growing = True
    while growing:
        growing = False
        for name, placement in placements.items():
            asked = placement.total
            if running[name] < most[name] and all(left.get(key, 0.0) >= amount for key, amount in asked.items()):
                left.update({key: left[key] - amount for key, amount in asked.items()})
                running[name] += 1
                growing = True
    return running


@dataclass(frozen=True, slots=True)
class Machine:
    """Resources of this machine, as a local Ray finds them."""

    cpus: float
    memory_bytes: int
    gpu_bytes: tuple[int, ...]
    """Memory of each GPU that this process may use."""

    @classmethod
    def local(cls, cluster: ClusterSpec) -> "Machine":
        """The resources of this machine; no more CPUs than the recipe gives to Ray."""
        cpus = cluster.cpus or psutil.cpu_count() or 1
        return cls(float(cpus), psutil.virtual_memory().total, _gpus())

    @property
    def resources(self) -> dict[str, float]:
        """Totals by Ray's resource names."""
        return {"CPU": self.cpus, "GPU": float(len(self.gpu_bytes))}


def _gpus() -> tuple[int, ...]:
    """Memory in bytes of each visible GPU; empty where nvidia-smi is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()
        sizes = tuple(int(line) << 20 for line in lines)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return sizes if visible is None else sizes[: len([name for name in visible.split(",") if name.strip()])]
