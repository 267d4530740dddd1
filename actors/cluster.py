"""The Ray cluster that a job works in, its machines, and how many threads a replica has there."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.config import ClusterSpec, Recipe, TeacherSpec


@contextmanager
def ray_cluster(cluster: ClusterSpec) -> Iterator[None]:
    """Start Ray on this machine, or join a cluster; leave it in the end, and with it every actor's memory.

    A process that has joined one already stays in it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    own = {"num_cpus": cluster.cpus, "include_dashboard": False} if cluster.address == "local" else {}
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False, **own)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own handler aborts with a stack trace
    try:
        yield
    finally:
        ray.shutdown()


def living_nodes() -> set[str]:
    """Ids of the machines that the cluster takes for alive."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def threads_of(teacher: TeacherSpec, recipe: Recipe, cluster_cpus: int) -> int:
    """Threads of one replica's arithmetic: its CPUs, or its share of a machine that it has to itself."""
    asked = max(1, int(teacher.placement.cpus))
    if recipe.cluster.address != "local":
        return asked
    ranks = sum(t.replica_range[1] * t.tensor_parallel * t.pipeline_parallel for t in recipe.teachers)
    return max(asked, cluster_cpus // ranks)
