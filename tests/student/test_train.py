import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.cache.storage.store import Store
from pipeline.errors import AdmissionError, RecipeError
from pipeline.models.tokenizers import ByteTokenizer
from student.data.dataset import make_dataset
from student.train import claim_folder, main, train
from student.training_job import TrainingJob, training_identity


def trained(run, arm="student", **changes):
    job = TrainingJob(run.recipe(**changes), "student", arm)
    train(job)
    return job.store.local_path()


def config_of(run):
    """Default model config of a small run's student."""
    return run.values()["student"]["config"]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_training_writes_weights_log_and_train_json(small_run):
    folder = trained(small_run)
    log = log_of(folder)
    assert [line["step"] for line in log] == list(range(1, log[-1]["steps"] + 1))
    assert {"loss", "kd", "ce", "feature", "gradient_norm", "learning_rate", "tokens"} <= set(log[0])
    timing = [json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines()]
    assert len(timing) == len(log)
    assert {"tokens_per_s", "memory_bytes", "input_wait_share"} <= set(timing[0])
    record = json.loads((folder / "train.json").read_text())
    assert record["steps"] == log[-1]["steps"]
    assert record["tokens"] == log[-1]["tokens"]
    assert {"torch", "transformers", "stillhouse"} <= set(record["versions"])
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in (folder / "final").iterdir()
    }
    assert list((folder / "tensorboard").iterdir())
    assert not list(folder.glob("checkpoints/*/*"))


def test_a_training_with_a_loss_for_comparison_prints_a_warning(small_run, capsys):
    trained(small_run, max_steps=1, distribution={"loss": "label_residual_kl"})
    assert "student: label_residual_kl is for comparison only: its optimum is not the" in capsys.readouterr().err
    trained(small_run, "control", max_steps=1, distribution={"loss": "label_residual_kl"})
    assert "for comparison only" not in capsys.readouterr().err


def test_difference_sampling_selects_the_sequences_that_the_teacher_predicts_better_than_the_reference(empty_run):
    dummy = {"model": "dummy", "engine": "dummy", "options": {"vocabulary": 300, "width": 16}}
    small = dummy | {"name": "small", "options": dummy["options"] | {"seed": 3}}
    two = {"teachers": [small, dummy | {"name": "large"}], "max_steps": 1}
    chosen = two | {"selection": {"sequences": {"reference": "small", "share": 0.5}}}
    empty_run.fill(empty_run.recipe(**two))
    job, control = (TrainingJob(empty_run.recipe(**chosen), "student", arm) for arm in ("student", "control"))
    large, reference = job.caches()[0], job.reference()
    gaps = {
        first.sequence.sequence_id: np.mean(first.signals.label_logprob_T - second.signals.label_logprob_T)
        for first, second in zip(large.rows("train"), reference.rows("train"), strict=True)
    }
    dataset = make_dataset(job, job.caches())
    kept = {dataset.sequence_id(number) for number in range(len(dataset))}
    assert len(kept) == round(0.5 * len(gaps))
    assert min(gaps[name] for name in kept) >= max(gaps[name] for name in set(gaps) - kept)
    assert len(make_dataset(control, control.caches())) == len(gaps)
    more = two | {"selection": {"sequences": {"reference": "small", "share": 0.6}}}
    other = TrainingJob(empty_run.recipe(**more), "student")
    assert training_identity(job, job.caches()) != training_identity(other, other.caches())
    assert set(training_identity(job, job.caches())["caches"]) == {
        cache.manifest.fingerprint for cache in (large, reference)
    }
    train(job)
    assert log_of(job.store.local_path())[-1]["kd"] > 0


def test_the_losses_of_a_training_fall(small_run):
    log = log_of(trained(small_run, epochs=6.0, learning_rate=1e-2))
    assert log[-1]["kd"] < 0.9 * log[0]["kd"]
    assert log[-1]["ce"] < 0.9 * log[0]["ce"]


def test_a_control_is_trained_on_cross_entropy_only(small_run):
    folder = trained(small_run, "control")
    assert folder.name == "student-control"
    for line in log_of(folder):
        assert line["loss"] == line["ce"]
        assert {"kd", "feature", "relation"}.isdisjoint(line)


def test_both_arms_start_from_the_same_weights_and_read_the_same_batches(small_run):
    student, control = (log_of(trained(small_run, arm)) for arm in ("student", "control"))
    assert student[0]["ce"] == control[0]["ce"]
    assert [line["tokens"] for line in student] == [line["tokens"] for line in control]


def test_the_same_training_twice_gives_the_same_bits(small_run):
    folder = trained(small_run)
    weights, log = (folder / "final/model.safetensors").read_bytes(), (folder / "log.jsonl").read_bytes()
    (folder / "train.json").unlink()
    (folder / "identity.json").unlink()
    again = trained(small_run)
    assert (again / "final/model.safetensors").read_bytes() == weights
    assert (again / "log.jsonl").read_bytes() == log


def test_a_finished_training_is_reported_without_importing_ray_or_torch(small_run):
    folder = trained(small_run)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    script = (
        "import sys; from student.train import main; code = main(sys.argv[1:]);"
        "print([m for m in ('ray', 'torch', 'transformers') if m in sys.modules]); sys.exit(code)"
    )
    job = str(small_run.job_file())
    done = subprocess.run([sys.executable, "-c", script, job], capture_output=True, text=True, check=True)
    assert "done already" in done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_finished_training_with_other_settings_is_kept_and_the_error_names_the_differing_ones(small_run, capsys):
    folder = trained(small_run)
    before = contents(folder)
    assert main([str(small_run.job_file(learning_rate=1e-3))]) == 2
    (printed,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "with other settings (training.learning_rate: got 0.001, expected 0.003); restore them" in printed
    assert contents(folder) == before
    trained(small_run)
    assert contents(folder) == before


def test_a_training_without_a_checkpoint_is_replaced_by_one_with_other_settings(small_run, capsys):
    job = TrainingJob(small_run.recipe(), "student")
    claim_folder(job, training_identity(job, job.caches()))
    job.store.put("log.jsonl", b"{}\n")
    job.store.put("final/left-over", b"")
    trained(small_run, learning_rate=1e-3)
    assert "restarts with other settings: training.learning_rate: got 0.001, expected 0.003" in capsys.readouterr().err
    assert not job.store.exists("final/left-over")


def test_leftovers_of_a_job_killed_after_train_json_are_deleted(small_run, capsys):
    folder = trained(small_run)
    for name in ("checkpoints/step-00000003/whole.json", "ray/attempt/checkpoint_manager_snapshot.json"):
        Store.open(folder).put(name, b"{}")
    trained(small_run)
    assert "done already" in capsys.readouterr().err
    assert not (folder / "checkpoints").exists()
    assert not (folder / "ray").exists()


def test_settings_that_do_not_change_the_weights_are_not_part_of_the_identity(small_run, capsys):
    trained(small_run)
    trained(small_run, checkpoint_every_steps=2, chunk_rows=64)
    assert "done already" in capsys.readouterr().err


def test_loss_settings_are_not_part_of_the_identity_of_a_control(small_run, capsys):
    trained(small_run, "control")
    trained(small_run, "control", losses={"kd": 1.0, "ce": 0.1})
    assert "done already" in capsys.readouterr().err


def test_a_training_in_an_object_store_gives_the_same_bits(small_run):
    values = small_run.values()
    uri = "memory://stillhouse-train-test"
    store = Store.open(uri)
    cache = Store.open(small_run.recipe().cache_uri("dummy"))
    for path in cache.list():
        store.put(f"caches/dummy/{path}", cache.read(path))
    job = TrainingJob.from_json({"recipe": values | {"storage": uri}, "student": "student"})
    train(job)
    local = trained(small_run)
    assert job.store.read("final/model.safetensors") == (local / "final/model.safetensors").read_bytes()
    assert job.store.read("log.jsonl") == (local / "log.jsonl").read_bytes()
    assert job.store.list("tensorboard")


def test_frozen_weights_do_not_change(small_run):
    folder = trained(small_run, freeze=["model.embed_tokens"])
    first = load_file(folder / "final/model.safetensors")
    shutil.rmtree(folder)
    again = load_file(trained(small_run, freeze=["model.embed_tokens"], learning_rate=1e-2) / "final/model.safetensors")
    same = {name for name in first if first[name].equal(again[name])}
    assert same == {"model.embed_tokens.weight"}


def save_checkpoint(run, folder, vocabulary=300, turn=b"<|turn|>"):
    torch.manual_seed(5)
    config = AutoConfig.for_model(**config_of(run), vocab_size=vocabulary)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name, data in ByteTokenizer().files().items():
        (folder / name).write_bytes(data.replace(b"<|turn|>", turn))
    return {"checkpoint": str(folder)}


def test_a_student_from_a_checkpoint_starts_from_its_weights(small_run):
    start = save_checkpoint(small_run, small_run.folder / "start")
    before = load_file(small_run.folder / "start/model.safetensors")
    folder = trained(small_run, student=start, freeze=["model.layers.0"])
    after = load_file(folder / "final/model.safetensors")
    assert set(after) == set(before)
    unmoved = {name for name in before if before[name].equal(after[name])}
    assert unmoved == {name for name in before if name.startswith("model.layers.0")}
    assert log_of(folder)[-1]["kd"] < log_of(folder)[0]["kd"]


def test_a_checkpoint_with_another_tokenizer_is_refused(small_run):
    student = save_checkpoint(small_run, small_run.folder / "start", turn=b"<|over|>")
    job = TrainingJob(small_run.recipe(student=student), "student")
    with pytest.raises(AdmissionError, match="expected the student's tokenizer"):
        train(job)
    assert job.store.list() == []


def test_lora_adapters_are_merged_into_the_final_weights(small_run):
    folder = trained(small_run, lora={"rank": 2})
    assert not any("lora" in name for name in load_file(folder / "final/model.safetensors"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"tokens_per_batch": 20},
            RecipeError,
            r"tokens_per_batch: expected at least the longest sequence \(48 tokens\)",
        ),
        ({"distribution": {"temperature": 2.0}}, RecipeError, r"training\.distribution\.temperature"),
        ({"distribution": {"loss": "nothing"}}, RecipeError, r"training\.distribution\.loss: got `nothing`"),
        ({"min_captured_mass": 0.999}, AdmissionError, r"at least 0\.999 .*\(training\.min_captured_mass\)"),
        ({"student": {"config": {"model_type": "llama", "vocab_size": 200}}}, AdmissionError, "vocabulary"),
    ],
)
def test_a_job_that_cannot_be_trained_is_refused_before_it_starts(small_run, changes, error, message):
    job = TrainingJob(small_run.recipe(**changes), "student")
    with pytest.raises(error, match=message):
        train(job)
    assert job.store.list() == []


def test_a_domain_without_a_teacher_is_refused_before_a_model_is_built(empty_run):
    (dummy,) = empty_run.values()["teachers"]
    teachers = [dummy | {"name": name, "options": dummy["options"] | {"seed": seed}} for seed, name in enumerate("ab")]
    changes = {"teachers": teachers, "capture": {"hidden_layers": []}, "losses": {"kd": 1.0}}
    recipe = empty_run.recipe(**changes, fusion={"how": "route", "by_domain": {"odd": "a"}})
    empty_run.fill(recipe)
    job = TrainingJob(recipe, "student")
    with pytest.raises(RecipeError, match=r"training\.fusion\.by_domain: no teacher for domain even"):
        train(job)
    assert job.store.list() == []


def test_a_checkpoint_whose_head_has_too_few_rows_for_its_tokenizer_is_refused(small_run, tmp_path):
    student = save_checkpoint(small_run, tmp_path / "narrow", vocabulary=200)
    job = TrainingJob(small_run.recipe(student=student), "student")
    with pytest.raises(AdmissionError, match="has a vocabulary of 200, expected at least the 257 ids of its tokenizer"):
        train(job)
    assert job.store.list() == []


def test_a_tracker_that_is_not_installed_is_refused_before_a_model_is_built(small_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    job = TrainingJob(small_run.recipe(trackers=["wandb"]), "student")
    with pytest.raises(RecipeError, match="wandb is not installed"):
        train(job)
    assert job.store.list() == []


@pytest.mark.slow
def test_a_compiled_student_is_trained_to_the_same_losses(small_run):
    student = {
        "config": config_of(small_run) | {"attention_dropout": 0.0}
    }  # compiled code uses another random number generator
    plain = log_of(trained(small_run, student=student, max_steps=2))
    shutil.rmtree(small_run.folder / "run/students")
    compiled = log_of(trained(small_run, student=student, max_steps=2, compile=True))
    assert counters["stats"]["unique_graphs"] > 0
    for compiled_line, plain_line in zip(compiled, plain, strict=True):
        assert compiled_line == pytest.approx(plain_line, rel=1e-4)


def test_a_layer_that_was_not_captured_is_refused_before_the_first_step(small_run):
    job = TrainingJob(small_run.recipe(feature={"layer_map": {1: 3}}), "student")
    with pytest.raises(RecipeError, match="teacher layer 3 was not captured"):
        train(job)
    assert not job.store.exists("log.jsonl")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda cache: next(cache.glob("data/train-*")).unlink(), "is damaged"),
        (lambda cache: next(cache.glob("data/train-*")).write_bytes(b"PAR1"), "is damaged"),
        (
            lambda cache: [file.unlink() for file in (cache / "manifest.json", next(cache.glob("commits/*")))],
            "incomplete",
        ),
    ],
)
def test_a_damaged_or_incomplete_cache_is_refused(small_run, harm, message):
    job = TrainingJob(small_run.recipe(), "student")
    harm(job.caches()[0].store.local_path())
    with pytest.raises(AdmissionError, match=message):
        train(job)
    assert job.store.list() == []


def test_a_missing_cache_gives_one_line_and_exit_code_2(empty_run, capsys):
    assert main([str(empty_run.job_file())]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1


def test_an_invalid_job_file_gives_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "job.json").write_text("[1")
    assert main([str(tmp_path / "job.json")]) == 2
    assert main([str(tmp_path / "missing.json")]) == 2
    assert main([]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 3
    assert all(line.startswith("error: ") for line in printed)
