"""Resolution of `dtype: auto`."""

import json
from pathlib import Path

import pytest

from pipeline.config import load_recipe
from pipeline.models import dtype as hardware
from student.loop.ray_trainer import gpus_per_worker
from student.model.dtype import resolve_dtype
from student.training_job import IDENTITY_JSON, TrainingJob


def job(*overrides: str) -> TrainingJob:
    return TrainingJob(load_recipe("dummy", overrides), "student")


@pytest.mark.parametrize(("flags", "dtype"), [("fpu avx2 amx_bf16 amx_tile", "bfloat16"), ("fpu avx2", "float32")])
def test_a_cpu_gets_bfloat16_if_it_multiplies_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, dtype: str
) -> None:
    (tmp_path / "cpuinfo").write_text(f"model name\t: x\nflags\t\t: {flags}\n")
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "cpuinfo")
    assert resolve_dtype(job("training.dtype=auto")).recipe.training.dtype == dtype


def test_an_unknown_cpu_gets_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "missing")
    assert resolve_dtype(job("training.dtype=auto")).recipe.training.dtype == "float32"


def test_a_started_training_keeps_its_dtype_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "missing")
    auto = job("training.dtype=auto", f"storage={tmp_path}")
    auto.store.put(IDENTITY_JSON, json.dumps({"training": {"dtype": "bfloat16"}}).encode())
    assert resolve_dtype(auto).recipe.training.dtype == "bfloat16"


@pytest.mark.parametrize(("visible", "dtype"), [(None, "bfloat16"), ("0", "bfloat16"), ("", "float32")])
def test_a_gpu_counts_unless_it_is_hidden_or_gpus_per_worker_is_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, dtype: str
) -> None:
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "missing")
    monkeypatch.setattr(hardware, "DEVICES", tmp_path)
    (tmp_path / "nvidia0").touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert resolve_dtype(job("training.dtype=auto")).recipe.training.dtype == dtype
    none = job("training.dtype=auto", "training.gpus_per_worker=0")
    assert resolve_dtype(none).recipe.training.dtype == "float32"


@pytest.mark.parametrize(
    ("overrides", "gpus", "expected"),
    [
        ([], 0.0, 0.0),
        ([], 1.0, 1.0),
        (["training.workers=2"], 1.0, 0.0),
        (["training.workers=2"], 2.0, 1.0),
        (["training.gpus_per_worker=0"], 2.0, 0.0),
        (["training.gpus_per_worker=0.5"], 0.0, 0.5),
    ],
)
def test_a_worker_takes_a_gpu_if_there_is_one_for_each(overrides: list[str], gpus: float, expected: float) -> None:
    assert gpus_per_worker(job(*overrides).recipe.training, {"CPU": 4.0, "GPU": gpus}) == expected


def test_a_gpu_gets_bfloat16_and_an_explicit_dtype_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "CPU_INFO", tmp_path / "missing")
    resolved = resolve_dtype(job("training.dtype=auto", "training.gpus_per_worker=1"))
    assert resolved.recipe.training.dtype == "bfloat16"
    explicit = job("training.dtype=float32")
    assert resolve_dtype(explicit) is explicit
