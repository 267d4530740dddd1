"""Where a teacher's replicas run: the recipe's words turned into Ray's.

One rank: one actor with the CPUs, GPUs, resources and labels that the recipe asks for. Several ranks (tensor times
pipeline parallel) on GPUs: a placement group of one bundle a rank, in which vLLM's Ray executor starts its workers;
the actor itself takes nothing. Several ranks on CPUs: vLLM's CPU ranks are processes of one actor, which therefore
takes the CPUs of all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import TeacherSpec
from pipeline.errors import RecipeError

ALL_GPUS_WITHOUT_ANY = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
"""Ray's switch for an actor that asks for no GPU. `1`: it sees none. `0`: it sees all that its node has."""
MAX_RESTARTS = 3
"""How often Ray brings a dead replica back by itself, before the supervisor asks for a new one."""


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


def place(teacher: TeacherSpec, cluster: Mapping[str, float]) -> Placement:
    """What one replica of the teacher needs on a cluster with those total resources."""
    asked = teacher.placement
    ranks = teacher.tensor_parallel * teacher.pipeline_parallel
    gpus = asked.gpus if asked.gpus is not None else float(teacher.engine != "dummy" and cluster.get("GPU", 0) > 0)
    if ranks == 1 or gpus == 0:
        # A replica beside GPUs that are not its own must not see them: its engine would take them.
        unseen = {ALL_GPUS_WITHOUT_ANY: "1"} if gpus == 0 and cluster.get("GPU", 0) > 0 else {}
        labels = dict(asked.label_selector)
        return Placement(asked.cpus * ranks, gpus, dict(asked.resources), labels, environment=unseen)
    bundle = {"CPU": asked.cpus, "GPU": gpus, **asked.resources}
    return Placement(
        cpus=0.0,
        gpus=0.0,
        label_selector=dict(asked.label_selector),
        bundles=(bundle,) * ranks,
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


class Site:
    """The reserved place of one replica: actor options, and a placement group where the ranks need one."""

    def __init__(self, placement: Placement) -> None:
        import ray

        self._placement = placement
        self._group = (
            ray.util.placement_group(
                list(placement.bundles),
                strategy=placement.strategy,
                bundle_label_selector=[placement.label_selector] * len(placement.bundles),
            )
            if placement.bundles
            else None
        )

    def options(self) -> dict[str, Any]:
        """Options for the replica's actor."""
        placement = self._placement
        options: dict[str, Any] = {
            "num_cpus": placement.cpus,
            "num_gpus": placement.gpus,
            "resources": placement.resources,
            "max_restarts": MAX_RESTARTS,
        }
        if placement.environment:
            options["runtime_env"] = {"env_vars": placement.environment}
        if self._group is None:
            return options | {"label_selector": placement.label_selector}
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return options | {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=0, placement_group_capture_child_tasks=True
            )
        }

    def release(self) -> None:
        """Give the place back."""
        if self._group is not None:
            import ray

            ray.util.remove_placement_group(self._group)
