"""Where Ray schedules replicas, with GPUs, resources and labels that the nodes only claim to have."""

import json
import os
import threading
import time

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import get_current_placement_group, placement_group_table

from actors.capture import capture
from actors.replicas.placement import ReplicaPlacement
from pipeline.config import TeacherSpec, recipe_from_dict
from pipeline.errors import ExitCode
from pipeline.planning.resources import placement_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def far_node():
    """Two nodes; the second one has the GPUs, the resource `rack` and the label `zone`."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "labels": {"zone": "near"}})
    node = cluster.add_node(num_cpus=4, num_gpus=2, resources={"rack": 2.0}, labels={"zone": "far"})
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    yield node.node_id
    ray.shutdown()
    cluster.shutdown()


class ProbeActor:
    """Reports where an actor with the options of a replica runs."""

    def where(self):
        context = ray.get_runtime_context()
        group = get_current_placement_group()
        return {
            "node": context.get_node_id(),
            "gpus": context.get_accelerator_ids()["GPU"],
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "bundles": None if group is None else group.bundle_specs,
            "held": context.get_assigned_resources(),
        }


@pytest.fixture
def create():
    """Create actors in the placements of a teacher's replicas; all are killed afterwards."""
    created = []

    def create_one(**teacher):
        spec = TeacherSpec.model_validate({"name": "a", "model": "m", "engine": "vllm", **teacher})
        placement = ReplicaPlacement(placement_for(spec, ray.cluster_resources()))
        actor = ray.remote(ProbeActor).options(**placement.options()).remote()
        created.append((actor, placement))
        return ray.get(actor.where.remote(), timeout=60)

    yield create_one
    for actor, placement in created:
        ray.kill(actor)
        placement.release()
    free_again()


def free_again():
    ends_s = time.monotonic() + 60
    while ray.available_resources().get("GPU") != 2.0 and time.monotonic() < ends_s:
        time.sleep(0.1)
    assert ray.available_resources()["GPU"] == 2.0


def test_a_replica_is_scheduled_by_its_label(create, far_node):
    for zone in ("far", "near", "far"):
        placement = {"gpus": 0.0, "label_selector": {"zone": zone}}
        assert (create(placement=placement)["node"] == far_node) == (zone == "far")


def test_a_replica_is_scheduled_where_its_resource_is_and_reserves_it(create, far_node):
    seen = create(placement={"gpus": 0.0, "resources": {"rack": 1.5}})
    assert seen["node"] == far_node
    assert seen["held"]["rack"] == 1.5


def test_fractions_share_a_gpu_and_whole_gpus_are_not_shared(create):
    halves = [create(placement={"cpus": 0.5, "gpus": 0.5}) for _ in range(2)]
    assert halves[0]["gpus"] == halves[1]["gpus"]
    assert halves[0]["held"]["GPU"] == 0.5
    assert create(placement={"cpus": 0.5, "gpus": 1.0})["gpus"] != halves[0]["gpus"]


def test_a_replica_that_asks_for_no_gpu_sees_none(create):
    assert create(placement={"gpus": 0.0, "label_selector": {"zone": "far"}})["visible"] == ""


def test_the_actor_of_several_ranks_is_in_their_placement_group_reserves_nothing_and_sees_the_gpus(create, monkeypatch):
    seen = create(tensor_parallel=2, placement={"resources": {"rack": 1.0}, "label_selector": {"zone": "far"}})
    assert seen["bundles"] == [{"CPU": 1.0, "GPU": 1.0, "rack": 1.0}] * 2
    assert seen["gpus"] == []
    assert seen["visible"] is None
    assert ray.available_resources().get("GPU", 0.0) == 0.0


def groups():
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def test_a_teacher_of_two_ranks_holds_its_placement_group_while_it_works_and_removes_it(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"id": f"d{i}", "text": f"row {i} of some text"}) + "\n" for i in range(8)))
    teacher = {"name": "a", "model": "dummy", "engine": "dummy", "tensor_parallel": 2, "placement": {"gpus": 1.0}}
    recipe = recipe_from_dict(
        {
            "name": "t",
            "storage": str(tmp_path / "run"),
            "corpus": {"source": str(text), "sequence_length": 64},
            "teachers": [{**teacher, "options": {"vocabulary": 300, "delay_s_per_token": 0.01}}],
            "capture": {"k": 4, "unit_sequences": 2},
        }
    )
    codes, seen = [], []
    work = threading.Thread(target=lambda: codes.append(capture(recipe, recipe.teachers)))
    work.start()
    while work.is_alive():
        seen += groups()
        time.sleep(0.1)
    assert codes == [ExitCode.DONE]
    created = [group for group in seen if group["state"] == "CREATED"]
    assert created
    assert {group["placement_group_id"] for group in seen} == {created[0]["placement_group_id"]}
    assert created[0]["bundles"] == {0: {"CPU": 1.0, "GPU": 1.0}, 1: {"CPU": 1.0, "GPU": 1.0}}
    assert groups() == []
    free_again()
