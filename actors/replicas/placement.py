"""Where a teacher's replicas run: the recipe's `placement` as options of Ray.

One rank: one actor with the CPUs, GPUs, resources and labels that the recipe asks for. Several ranks (tensor times
pipeline parallel) on GPUs: a placement group of one bundle per rank, in which vLLM's Ray executor starts its workers;
the actor itself reserves nothing. Several ranks on CPUs: vLLM's CPU ranks are processes of one actor, which therefore
reserves the CPUs of all of them.
"""

from typing import Any

from pipeline.config import Recipe, TeacherSpec
from pipeline.planning.resources import Placement

MAX_RESTARTS = 3
"""How often Ray restarts a dead actor before the pool creates a new one."""


def threads_of(teacher: TeacherSpec, recipe: Recipe, cluster_cpus: int) -> int:
    """CPU threads of one replica: its CPUs, or on a local cluster its share of the machine."""
    asked = max(1, int(teacher.placement.cpus))
    if recipe.cluster.address != "local":
        return asked
    ranks = sum(t.replica_range[1] * t.ranks for t in recipe.teachers)
    return max(asked, cluster_cpus // ranks)


def living_nodes() -> set[str]:
    """Ids of the nodes that the cluster takes for alive."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


class ReplicaPlacement:
    """The actor options of one replica, and the placement group where the ranks need one."""

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
        """Ray options of the replica's actor."""
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
        """Remove the placement group."""
        if self._group is not None:
            import ray

            ray.util.remove_placement_group(self._group)
