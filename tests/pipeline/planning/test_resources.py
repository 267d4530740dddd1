import pytest

from pipeline.config import TeacherSpec
from pipeline.errors import RecipeError
from pipeline.planning.resources import check_fits, is_idle, placement_for

CPUS = {"CPU": 8.0}
GPUS = {"CPU": 64.0, "GPU": 8.0}


def teacher(**more):
    return TeacherSpec.model_validate({"name": "a", "model": "m", "engine": "vllm", **more})


def test_a_replica_takes_one_gpu_where_there_are_some():
    assert placement_for(teacher(), GPUS).total == {"CPU": 1.0, "GPU": 1.0}
    assert placement_for(teacher(), CPUS).total == {"CPU": 1.0}


def test_a_dummy_takes_no_gpu():
    assert "GPU" not in placement_for(teacher(engine="dummy"), GPUS).total


def test_fractions_labels_and_resources_pass_through():
    placement = {"cpus": 0.5, "gpus": 0.25, "resources": {"rack": 1.0}, "label_selector": {"zone": "a"}}
    placed = placement_for(teacher(placement=placement), GPUS)
    assert placed.total == {"CPU": 0.5, "GPU": 0.25, "rack": 1.0}
    assert placed.label_selector == {"zone": "a"}


def test_ranks_on_gpus_get_a_bundle_each_on_one_node():
    placed = placement_for(teacher(tensor_parallel=4, placement={"cpus": 2.0}), GPUS)
    assert placed.bundles == ({"CPU": 2.0, "GPU": 1.0},) * 4
    assert placed.strategy == "STRICT_PACK"
    assert (placed.cpus, placed.gpus) == (0.0, 0.0)
    assert placed.total == {"CPU": 8.0, "GPU": 4.0}


def test_pipeline_stages_may_lie_on_several_nodes():
    assert placement_for(teacher(tensor_parallel=2, pipeline_parallel=2), GPUS).strategy == "PACK"


def test_ranks_on_cpus_are_processes_of_one_actor():
    placed = placement_for(teacher(tensor_parallel=2, placement={"cpus": 2.0}), CPUS)
    assert placed.bundles == ()
    assert placed.total == {"CPU": 4.0}


def test_what_can_never_fit_is_refused_with_what_there_is():
    with pytest.raises(RecipeError, match="asks for 16 CPU, expected at most 8"):
        check_fits(teacher(), placement_for(teacher(placement={"cpus": 16.0}), CPUS), CPUS)


@pytest.mark.parametrize(
    ("available", "idle"),
    [({"CPU": 8.0}, True), ({"CPU": 7.0}, False), ({}, False)],
    ids=["all free", "somebody works", "all taken"],
)
def test_a_cluster_is_idle_when_nobody_uses_what_is_asked_for(available, idle):
    assert is_idle(placement_for(teacher(), CPUS), CPUS, available) is idle


def test_a_cluster_that_lacks_what_is_asked_for_is_not_idle_but_too_small():
    assert not is_idle(placement_for(teacher(placement={"gpus": 1.0}), CPUS), CPUS, CPUS)
