"""What a teacher's replicas ask a cluster for, and what this machine has. No Ray in it."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field

import psutil

from pipeline.config import ClusterSpec, TeacherSpec
from pipeline.errors import RecipeError

ALL_GPUS_WITHOUT_ANY = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
"""Ray's switch for an actor that asks for no GPU. `1`: it sees none. `0`: it sees all that its node has."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What one replica asks the cluster for."""

    cpus: float
    gpus: float
    resources: dict[str, float] = field(default_factory=dict)
    label_selector: dict[str, str] = field(default_factory=dict)
    bundles: tuple[dict[str, float], ...] = ()
    """Set: a placement group of these, and the actor in the first one of them."""
    strategy: str = "PACK"
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the replica's processes, from before their first import."""

    @property
    def total(self) -> dict[str, float]:
        """Everything that one replica takes, by Ray's resource names."""
        asked = self.bundles or ({"CPU": self.cpus, "GPU": self.gpus, **self.resources},)
        names = {name for bundle in asked for name in bundle}
        summed = {name: sum(bundle.get(name, 0.0) for bundle in asked) for name in sorted(names)}
        return {name: amount for name, amount in summed.items() if amount > 0}


def placement_for(teacher: TeacherSpec, cluster: Mapping[str, float]) -> Placement:
    """What one replica of the teacher needs on a cluster with those total resources."""
    asked = teacher.placement
    gpus = asked.gpus if asked.gpus is not None else float(teacher.engine != "dummy" and cluster.get("GPU", 0) > 0)
    if teacher.ranks == 1 or gpus == 0:
        # A replica beside GPUs that are not its own must not see them: its engine would take them.
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
        # The actor holds no GPU, but vLLM in it must see that its node has some before it starts its ranks.
        environment={ALL_GPUS_WITHOUT_ANY: "0"},
    )


def check_fits(teacher: TeacherSpec, placement: Placement, cluster: Mapping[str, float]) -> None:
    """Raise RecipeError where not even one replica fits into a cluster that cannot grow."""
    for name, amount in placement.total.items():
        if amount > cluster.get(name, 0.0):
            raise RecipeError(
                f"teacher {teacher.name}: one replica asks for {amount:g} {name}, expected at most "
                f"{cluster.get(name, 0.0):g} (all that this cluster has); see teachers.placement and cluster.cpus"
            )


def fitting(placement: Placement, cluster: Mapping[str, float]) -> int:
    """Replicas that an empty cluster has room for, at least one."""
    rooms = (int(cluster.get(name, 0.0) // amount) for name, amount in placement.total.items())
    return max(1, min(rooms, default=1))


def is_idle(placement: Placement, cluster: Mapping[str, float], available: Mapping[str, float]) -> bool:
    """Whether the cluster has all that one replica asks for, and nobody uses any of it.

    Less would not do: free amounts that add up may lie on different nodes, and a replica that is just starting already
    holds its own share.
    """
    return all(
        available.get(name, 0.0) >= max(amount, cluster.get(name, 0.0)) for name, amount in placement.total.items()
    )


def side_by_side(
    placements: Mapping[str, Placement], most: Mapping[str, int], cluster: Mapping[str, float]
) -> dict[str, int]:
    """Replicas of each teacher that run at a time: one more for each in turn, until nothing fits or all are there."""
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
    """What a local Ray would find here."""

    cpus: float
    memory_bytes: int
    gpu_bytes: tuple[int, ...]
    """Memory of each GPU."""

    @classmethod
    def here(cls, cluster: ClusterSpec) -> "Machine":
        """With no more CPUs than the recipe lets Ray have."""
        cpus = cluster.cpus or psutil.cpu_count() or 1
        return cls(float(cpus), psutil.virtual_memory().total, _gpus())

    @property
    def resources(self) -> dict[str, float]:
        """By Ray's resource names."""
        return {"CPU": self.cpus, "GPU": float(len(self.gpu_bytes))}


def _gpus() -> tuple[int, ...]:
    """Memory of every GPU that this process may use; none where NVIDIA's tool is missing or fails."""
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
