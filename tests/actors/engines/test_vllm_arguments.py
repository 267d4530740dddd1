"""Arguments and environment of vLLM. No engine starts."""

import os

import pytest

from actors.engines.vllm_engine import _set_environment, engine_arguments
from pipeline.config import TeacherSpec
from pipeline.models.folders import ModelFolder


@pytest.fixture
def arguments(tmp_path):
    def build(positions=512, *, on_cpu=False, **teacher):
        model = ModelFolder(tmp_path, "m", None, "", "", {"max_position_embeddings": 2048})
        return engine_arguments(spec(**teacher), model, positions, on_cpu=on_cpu)

    return build


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
def test_several_ranks_use_the_ray_executor_on_gpus_and_mp_on_a_cpu(arguments, teacher, on_cpu, executor):
    assert arguments(on_cpu=on_cpu, **teacher)["distributed_executor_backend"] == executor


@pytest.mark.parametrize(("positions", "length"), [(512, 512), (4096, 2048), (None, None)])
def test_max_model_len_is_the_corpus_length_up_to_the_models_limit(arguments, positions, length):
    assert arguments(positions)["max_model_len"] == length


@pytest.mark.parametrize(("gpus", "share"), [(None, 0.8), (1.0, 0.8), (0.25, 0.2), (2.0, 0.8)])
def test_memory_utilization_is_scaled_by_the_replicas_fraction_of_a_gpu(arguments, gpus, share):
    assert arguments(gpu_memory_share=0.8, placement={"gpus": gpus})["gpu_memory_utilization"] == pytest.approx(share)


def test_on_a_cpu_the_kv_cache_size_comes_from_the_recipe(arguments):
    on_cpu = arguments(on_cpu=True, kv_cache_gib=0.5)
    assert on_cpu["kv_cache_memory_bytes"] == 2**29
    assert "gpu_memory_utilization" not in on_cpu


@pytest.mark.parametrize(("gpus", "gpus_per_rank"), [(None, "1"), (0.5, "0.5")])
def test_each_rank_requests_the_gpu_fraction_of_its_bundle(monkeypatch, gpus, gpus_per_rank):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    _set_environment(spec(tensor_parallel=2, placement={"gpus": gpus}))
    assert os.environ["VLLM_RAY_PER_WORKER_GPUS"] == gpus_per_rank
