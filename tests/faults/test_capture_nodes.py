"""A node of the cluster is removed while its teachers work: the others finish.

The teachers have two ranks, each with a GPU that the nodes only claim to have: every replica has a placement group.
"""

import json
import threading
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from actors.capture import CaptureTask, create_pool
from actors.replicas.pool import run_pools
from actors.replicas.replica import ReplicaState
from pipeline.cache.storage.layout import MANIFEST_JSON
from pipeline.config import recipe_from_dict

NODES = 3
ROWS = 160


@pytest.fixture
def cluster():
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": {"health_check_period_ms": 500}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def recipe_at(tmp_path, address):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"id": f"d{i}", "text": f"row {i} of some text"}) + "\n" for i in range(ROWS)))
    options = {"vocabulary": 300, "delay_s_per_token": 0.005}
    placement = {"cpus": 1.0, "gpus": 1.0}
    return recipe_from_dict(
        {
            "name": "nodes",
            "storage": str(tmp_path / "run"),
            "cluster": {"address": address},
            "corpus": {"source": str(text), "sequence_length": 64},
            "teachers": [
                {"name": "a", "model": "dummy", "engine": "dummy", "replicas": NODES, "options": options,
                 "tensor_parallel": 2, "placement": placement}
            ],
            "capture": {"k": 4, "unit_sequences": 4},
        }
    )  # fmt: skip


def groups_in(state):
    return [group for group in ray.util.placement_group_table().values() if group["state"] == state]


@pytest.mark.slow
def test_the_run_survives_a_lost_node_and_releases_all_resources(cluster, tmp_path):
    removed, *_ = [cluster.add_node(num_cpus=2, num_gpus=2) for _ in range(NODES)]
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    recipe = recipe_at(tmp_path, cluster.address)
    task = CaptureTask.all_of(recipe, [recipe.teachers[0]])[0]
    pool = create_pool(recipe, task)
    lost = []

    def remove_node():
        while not pool.finished:
            if sum(replica.state is ReplicaState.RUNNING for replica in pool._replicas) == NODES and pool.stats.items:
                lost.append((pool.stats.items, len(groups_in("CREATED"))))
                cluster.remove_node(removed, allow_graceful=False)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=remove_node, daemon=True)
    thread.start()
    run_pools([pool])
    thread.join(60)
    ((units, groups),) = lost
    assert units < len(task.pending)
    assert groups == NODES
    assert pool.stats.retries >= 1
    assert json.loads(task.cache.store.read(MANIFEST_JSON))["rows"] == ROWS
    assert pool.work.verdict is not None
    assert pool.work.verdict.usable
    left = {"CPU": 2.0 * (NODES - 1), "GPU": 2.0 * (NODES - 1)}
    ends_s = time.monotonic() + 60
    while free_of(left) != left and time.monotonic() < ends_s:
        time.sleep(0.5)
    assert free_of(left) == left == {name: ray.cluster_resources()[name] for name in left}
    assert len(groups_in("REMOVED")) == len(ray.util.placement_group_table()) >= NODES


def free_of(names):
    return {name: ray.available_resources().get(name, 0.0) for name in names}
