"""What vLLM is told, case by case. No engine starts."""

import os

import pytest

from actors.engines.vllm_engine import _set_environment, engine_arguments
from pipeline.config import TeacherSpec
from pipeline.models.folders import ModelFolder


@pytest.fixture
def told(tmp_path):
    def arguments(positions=512, *, on_cpu=False, **teacher):
        model = ModelFolder(tmp_path, "m", None, "", "", {"max_position_embeddings": 2048})
        return engine_arguments(spec(**teacher), model, positions, on_cpu=on_cpu)

    return arguments


def spec(**teacher):
    return TeacherSpec.model_validate({"name": "a", "model": "m", **teacher})


@pytest.mark.parametrize(
    ("teacher", "on_cpu", "executor"),
    [
        ({}, False, "uni"),
        ({}, True, "uni"),
        ({"tensor_parallel": 2}, False, "ray"),
        ({"pipeline_parallel": 2}, False, "ray"),
        ({"tensor_parallel": 2}, True, "mp"),
    ],
)
def test_several_ranks_are_rays_on_gpus_and_child_processes_on_a_cpu(told, teacher, on_cpu, executor):
    assert told(on_cpu=on_cpu, **teacher)["distributed_executor_backend"] == executor


@pytest.mark.parametrize(("positions", "length"), [(512, 512), (4096, 2048), (None, None)])
def test_room_is_made_for_the_corpus_sequences_and_not_for_all_that_the_model_can_read(told, positions, length):
    assert told(positions)["max_model_len"] == length


@pytest.mark.parametrize(("gpus", "share"), [(None, 0.8), (1.0, 0.8), (0.25, 0.2), (2.0, 0.8)])
def test_replicas_with_a_part_of_a_gpu_leave_the_others_theirs(told, gpus, share):
    arguments = told(gpu_memory_share=0.8, placement={"gpus": gpus})
    assert arguments["gpu_memory_utilization"] == pytest.approx(share)


def test_on_a_cpu_the_memory_for_keys_and_values_is_the_recipes(told):
    arguments = told(on_cpu=True, kv_cache_gib=0.5)
    assert arguments["kv_cache_memory_bytes"] == 2**29
    assert "gpu_memory_utilization" not in arguments


@pytest.mark.parametrize(("gpus", "asked"), [(None, "1"), (0.5, "0.5")])
def test_each_rank_asks_for_as_much_gpu_as_its_bundle_holds(monkeypatch, gpus, asked):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    _set_environment(spec(tensor_parallel=2, placement={"gpus": gpus}))
    assert os.environ["VLLM_RAY_PER_WORKER_GPUS"] == asked
