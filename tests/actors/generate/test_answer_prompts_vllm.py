"""vLLM generates, is shut down, and scores its answers; transformers generates the same answers at temperature 0."""

import json

import pytest

from actors.capture import capture
from actors.generate.answer_prompts import prepare_caches
from pipeline.cache.storage.store import Store
from pipeline.cache.unit_list import UnitList
from pipeline.config import recipe_from_dict
from pipeline.errors import ExitCode


def recipe_of(tmp_path, engine, model):
    text = tmp_path / "prompts.jsonl"
    text.write_text("".join(json.dumps({"id": f"d{i}", "text": f"oak and water {i}"}) + "\n" for i in range(6)))
    teacher = {"name": "a", "model": str(model), "engine": engine, "dtype": "float32", "kv_cache_gib": 0.1}
    return recipe_from_dict(
        {
            "name": "t",
            "storage": str(tmp_path / engine),
            "cluster": {"cpus": 2},
            "corpus": {"source": str(text), "sequence_length": 64},
            "teachers": [{**teacher, "sampling": {"temperature": 0.0, "max_tokens": 6}}],
            "capture": {"k": 8, "unit_sequences": 4},
        }
    )


def sequences_of(recipe):
    units = UnitList.open(Store.open(recipe.cache_uri("a")))
    return {row.document_id: row for unit_id in units.unit_ids() for row in units.read(unit_id).sequences}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("two_cpus_of_ray")
def test_vllm_answers_then_scores_its_answers_and_transformers_says_the_same(tmp_path, tiny_llama):
    by_vllm = recipe_of(tmp_path, "vllm", tiny_llama.path)
    assert capture(by_vllm, by_vllm.teachers) is ExitCode.DONE
    answered = sequences_of(by_vllm)
    assert len(answered) == 6
    assert all(0 < row.loss_mask_N.sum() < len(row.input_ids_N) for row in answered.values())

    by_transformers = recipe_of(tmp_path, "transformers", tiny_llama.path)
    prepare_caches(by_transformers, by_transformers.teachers)
    same = [
        list(row.input_ids_N) == list(answered[name].input_ids_N) for name, row in sequences_of(by_transformers).items()
    ]
    assert sum(same) >= 5  # greedy, but for ties between kernels
