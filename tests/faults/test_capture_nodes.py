"""A node of the cluster goes away while its teachers work: the others finish."""

import json
import threading
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from actors.capture import Task, make_crew
from actors.crew import State
from actors.supervise import supervise
from pipeline.cache.layout import MANIFEST_JSON
from pipeline.config import recipe_from


@pytest.fixture
def cluster():
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": {"health_check_period_ms": 500}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def recipe_at(tmp_path, address):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"id": f"d{i}", "text": f"row {i} of some text"}) + "\n" for i in range(72)))
    options = {"vocabulary": 300, "delay_s_per_token": 0.005}
    placement = {"cpus": 1.0}
    return recipe_from(
        {
            "name": "nodes",
            "storage": str(tmp_path / "run"),
            "cluster": {"address": address},
            "corpus": {"source": str(text), "sequence_length": 64},
            "teachers": [
                {"name": "a", "model": "dummy", "engine": "dummy", "replicas": 3, "options": options,
                 "placement": placement}
            ],
            "capture": {"k": 4, "unit_sequences": 4},
        }
    )  # fmt: skip


@pytest.mark.slow
def test_a_lost_node_is_survived_and_leaves_nothing_behind(cluster, tmp_path):
    doomed, *_ = [cluster.add_node(num_cpus=1) for _ in range(3)]
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    recipe = recipe_at(tmp_path, cluster.address)
    task = Task.of(recipe, recipe.teachers[0])
    crew = make_crew(recipe, task)
    lost = []

    def lose_the_node():
        while sum(replica.state is State.SERVING for replica in crew._replicas) < 3 or not crew.ledger.units:
            time.sleep(0.05)
        lost.append(crew.ledger.units)
        cluster.remove_node(doomed, allow_graceful=False)

    thread = threading.Thread(target=lose_the_node)
    thread.start()
    supervise([crew])
    thread.join()
    assert lost
    assert lost[0] < len(task.pending)
    assert crew.ledger.retries >= 1
    assert json.loads(task.cache.store.read(MANIFEST_JSON))["rows"] == 72
    assert crew.verdict is not None
    assert crew.verdict.usable
    ends_s = time.monotonic() + 60
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"] and time.monotonic() < ends_s:
        time.sleep(0.5)
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"] == 2.0
    assert not [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
