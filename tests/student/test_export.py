import json
import subprocess
import sys

import pytest
import torch

from pipeline.cache.storage.store import Store
from pipeline.identity import sha256_file
from student.evaluate import evaluate
from student.export import export, main
from student.release.final import load_final
from student.train import train
from student.training_job import TrainingJob

LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, GenerationConfig
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True)
GenerationConfig.from_pretrained(sys.argv[1])
logits = model(torch.tensor([[1, 2, 3, 4]])).logits
print(json.dumps([str(model.dtype), logits.float().tolist()]))
"""


@pytest.fixture
def exported(small_run):
    recipe = small_run.recipe()
    train(TrainingJob(recipe, "student"))
    export(recipe)
    return recipe, small_run.folder / "run/export/student"


def test_transformers_loads_the_folder_with_the_trained_weights(exported):
    recipe, folder = exported
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=True)
    dtype, logits = json.loads(done.stdout)
    assert dtype == "torch.bfloat16"
    expected = load_final(TrainingJob(recipe, "student").store).bfloat16()(torch.tensor([[1, 2, 3, 4]])).logits
    assert torch.allclose(torch.tensor(logits), expected.float(), atol=1e-6)


def test_the_folder_has_all_files_of_a_model_folder(exported):
    _, folder = exported
    assert {path.name for path in folder.iterdir()} >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "provenance.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_provenance_has_the_digest_of_every_file_and_the_caches_of_the_teachers(exported):
    recipe, folder = exported
    provenance = json.loads((folder / "provenance.json").read_text())
    for name, digest in provenance["files"].items():
        assert sha256_file(folder / name) == digest
    assert set(provenance["files"]) == {path.name for path in folder.iterdir()} - {"README.md", "provenance.json"}
    (teacher,) = provenance["teachers"]
    assert teacher["cache"] == TrainingJob(recipe, "student").caches()[0].manifest.fingerprint
    assert provenance["training"]["steps"] > 0
    assert provenance["recipe"]["name"] == "small"


def test_the_model_card_has_the_results_after_an_evaluation(small_run, exported):
    recipe, folder = exported
    assert "Held-out results" not in (folder / "README.md").read_text()
    train(TrainingJob(recipe, "student", "control"))
    evaluate(recipe)
    export(recipe)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| student |" in card


def test_files_of_an_earlier_export_are_deleted(exported):
    recipe, folder = exported
    expected = {path.name for path in folder.iterdir()}
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (folder / "model.safetensors.index.json").write_text("{}")
    export(recipe)
    assert {path.name for path in folder.iterdir()} == expected


def test_a_student_that_is_not_trained_gives_one_line(small_run, capsys):
    assert main([str(small_run.job_file())]) == 2
    assert "not trained yet" in capsys.readouterr().err


def test_a_student_is_exported_to_an_object_store(small_run):
    values = small_run.values() | {"storage": "memory://stillhouse-export-test"}
    job = TrainingJob.from_json({"recipe": values, "student": "student"})
    cache = Store.open(small_run.recipe().cache_uri("dummy"))
    for path in cache.list():
        Store.open(job.recipe.cache_uri("dummy")).put(path, cache.read(path))
    train(job)
    export(job.recipe)
    assert "provenance.json" in Store.open(job.recipe.storage).child("export/student").list()
