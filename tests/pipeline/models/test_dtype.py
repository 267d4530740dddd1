"""Resolution of `dtype: auto`."""

import json
from pathlib import Path

import pytest

from pipeline.cache.description import read_identity
from pipeline.config import load_recipe
from pipeline.corpus.prepare import prepare_cache
from pipeline.models import dtype
from pipeline.models.dtype import resolve_dtype


def recipe_with(tmp_path: Path, **teacher: object):
    recipe = load_recipe("dummy", [f"storage={tmp_path / 'run'}"])
    changed = recipe.teachers[0].model_copy(update={"dtype": "auto", **teacher})
    return recipe.model_copy(update={"teachers": (changed,)})


@pytest.fixture(autouse=True)
def no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(dtype, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def processor(tmp_path, monkeypatch, flags: str) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name\t: x\nflags\t\t: {flags}\n")
    monkeypatch.setattr(dtype, "CPU_INFO", tmp_path / "cpuinfo")


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("avx2 amx_bf16", "bfloat16"), ("avx2 avx512_bf16", "bfloat16"), ("avx2 avx512f", "float32"), ("", "float32")],
)
def test_the_dtype_follows_the_cpus_instructions(tmp_path, monkeypatch, flags, dtype):
    processor(tmp_path, monkeypatch, flags)
    recipe = recipe_with(tmp_path, engine="vllm", options={})
    assert resolve_dtype(recipe.teachers[0], recipe).dtype == dtype
    assert resolve_dtype(recipe.teachers[0]).dtype == dtype


def test_a_gpu_and_a_remote_cluster_get_bfloat16(tmp_path, monkeypatch):
    processor(tmp_path, monkeypatch, "avx2")
    recipe = recipe_with(tmp_path, engine="vllm", options={})
    remote = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"address": "auto"})})
    assert resolve_dtype(recipe.teachers[0], remote).dtype == "bfloat16"
    (tmp_path / "nvidia0").touch()
    assert resolve_dtype(recipe.teachers[0], recipe).dtype == "bfloat16"


def test_a_dtype_of_the_recipe_is_kept(tmp_path):
    teacher = recipe_with(tmp_path, dtype="float16").teachers[0]
    assert resolve_dtype(teacher) is teacher


def test_an_existing_cache_keeps_its_dtype_on_another_machine(tmp_path):
    recipe = recipe_with(tmp_path)
    float16 = recipe.model_copy(update={"teachers": (recipe.teachers[0].model_copy(update={"dtype": "float16"}),)})
    first = prepare_cache(float16, float16.teachers[0])
    again = prepare_cache(recipe, recipe.teachers[0])
    assert again.fingerprint == first.fingerprint
    assert json.loads(json.dumps(dict(read_identity(again.store).fields)))["teacher"]["dtype"] == "float16"
