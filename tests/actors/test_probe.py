"""Measures the throughput of each engine on a small corpus."""

import json

import pytest

from pipeline.config import recipe_from_dict
from pipeline.errors import UsageError
from pipeline.run.launch import measure_throughput


@pytest.fixture
def make_recipe(tmp_path):
    def make(engine, model):
        text = tmp_path / "text.jsonl"
        text.write_text("".join(json.dumps({"id": f"d{i}", "text": "oak and water " * 20}) + "\n" for i in range(8)))
        teacher = {"name": "a", "model": str(model), "engine": engine, "dtype": "float32", "kv_cache_gib": 0.1}
        return recipe_from_dict(
            {
                "name": "t",
                "storage": str(tmp_path / "run"),
                "corpus": {"source": str(text), "sequence_length": 64},
                "teachers": [teacher],
                "capture": {"k": 8, "hidden_layers": [-1], "unit_sequences": 4},
            }
        )

    return make


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_every_engine_can_be_probed_and_nothing_is_stored(make_recipe, tiny_llama, tmp_path, engine):
    recipe = make_recipe(engine, tiny_llama.path)
    assert 10 < measure_throughput(recipe, recipe.teachers[0]) < 1e7
    assert not (tmp_path / "run").exists()


def test_a_probe_of_a_model_that_is_not_there_is_a_usage_error_of_one_line(make_recipe):
    recipe = make_recipe("transformers", "no/such/folder")
    with pytest.raises(UsageError, match=r"^probe of teacher a: model no/such/folder: no such folder.*$"):
        measure_throughput(recipe, recipe.teachers[0])
