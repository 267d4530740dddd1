import json
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.cache.schema import ShardSpec
from pipeline.config import TeacherSpec, recipe_from
from pipeline.contracts import CaptureSpec, TargetMode
from pipeline.errors import RecipeError
from pipeline.estimate import column_bytes, kv_bytes_per_token, raw_bytes_per_token, weights_bytes
from pipeline.plan import Counts, pays_off_after, plan
from pipeline.prepare import prepare_cache


@pytest.fixture
def make_recipe(tmp_path):
    def make(teacher=None, **more):
        text = tmp_path / "text.jsonl"
        lines = [{"id": f"d{i}", "text": f"document {i} " * 20} for i in range(30)]
        text.write_text("".join(json.dumps(line) + "\n" for line in lines))
        base = {"name": "a", "model": "dummy", "engine": "dummy"}
        return recipe_from(
            {
                "name": "t",
                "storage": str(tmp_path / "run"),
                "corpus": {"source": str(text), "sequence_length": 64},
                "teachers": [{**base, **(teacher or {})}],
                "capture": {"k": 8, "unit_sequences": 4, **more.pop("capture", {})},
                **more,
            }
        )

    return make


def test_the_counts_are_those_of_the_prepared_cache_and_nothing_is_written(make_recipe, tmp_path):
    recipe = make_recipe()
    counts = plan(recipe).teachers[0].counts
    assert not (tmp_path / "run").exists()
    cache = prepare_cache(recipe, recipe.teachers[0])
    assert counts.total_tokens == cache.tokens
    assert counts.units == len(cache.unit_ids)


def test_hours_follow_from_the_pace_and_the_replicas(make_recipe):
    alone = plan(make_recipe(), tokens_per_s=100.0).teachers[0]
    pair = plan(make_recipe({"replicas": 2}), tokens_per_s=100.0).teachers[0]
    assert alone.hours == pytest.approx(alone.counts.total_tokens / 100.0 / 3600)
    assert pair.hours == pytest.approx(alone.hours / 2)
    assert plan(make_recipe()).teachers[0].hours is None


def test_a_longer_list_and_a_hidden_layer_cost_more_bytes(make_recipe):
    sizes = [
        plan(make_recipe(capture=capture)).teachers[0].stored_bytes
        for capture in ({"k": 4}, {"k": 16}, {"k": 16, "hidden_layers": [1]})
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2]


def test_the_report_is_plain_json_and_readable_text(make_recipe):
    outcome = plan(make_recipe(), tokens_per_s=50.0)
    values = json.loads(json.dumps(outcome.as_json()))
    assert values["teachers"][0]["tokens"] == outcome.teachers[0].counts.total_tokens
    assert values["teachers"][0]["memory_bytes"] > 2**30
    for word in ("tokens", "storage", "memory", "time", "pays off"):
        assert word in str(outcome)


@pytest.mark.parametrize("mode", TargetMode)
def test_every_target_mode_can_be_estimated(mode):
    spec = ShardSpec(CaptureSpec(mode=mode, k=8), vocabulary=1000, hidden_width=32, layers=2)
    assert sum(column_bytes(spec, 64).values()) > 0


def test_hidden_states_are_the_bulk_of_a_wide_teacher():
    spec = ShardSpec(CaptureSpec(k=64, hidden_layers=(1, -1)), vocabulary=50_000, hidden_width=576, layers=2)
    sizes = column_bytes(spec, 128)
    assert 0.5 * 2 * 576 < sizes["hidden_1"] < 2 * 576
    assert raw_bytes_per_token(spec) == 64 * 8 + 28 + 3 * 2 * 576


def counts(train, held_out):
    return Counts(units=1, sequences=1, tokens={"train": train, "held_out": held_out}, audited_tokens=0)


@pytest.mark.parametrize(("epochs", "runs"), [(1.0, 2), (2.0, 1), (0.5, 3)])
def test_the_cache_pays_off_sooner_the_more_often_it_is_read(epochs, runs):
    assert pays_off_after(counts(1000, 0), epochs) == runs


def test_weights_are_counted_from_the_files_headers(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a": np.zeros((3, 5), np.float32), "b": np.zeros(7, np.float16)}, tmp_path / "model.safetensors")
    spec = {"name": "a", "model": "m"}
    assert weights_bytes(tmp_path, TeacherSpec.model_validate(spec)) == 2 * (15 + 7)
    assert weights_bytes(tmp_path, TeacherSpec.model_validate({**spec, "dtype": "float32"})) == 4 * (15 + 7)
    assert weights_bytes(tmp_path, TeacherSpec.model_validate({**spec, "quantization": "awq"})) == 4 * 15 + 2 * 7


def test_keys_and_values_follow_the_kept_heads():
    config = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576, "num_hidden_layers": 30}
    assert kv_bytes_per_token(config, "bfloat16") == 2 * 30 * 3 * 64 * 2


def test_more_memory_than_the_machine_has_is_refused_with_both_numbers(make_recipe):
    rows = psutil.virtual_memory().total // 4 // 512
    teacher = {"chunk_rows": rows, "max_batched_tokens": rows}
    with pytest.raises(RecipeError, match=r"teacher a: a replica takes .* of memory, expected at most"):
        plan(make_recipe(teacher))


def test_more_bytes_than_the_disk_has_free_are_refused(make_recipe, monkeypatch):
    monkeypatch.setattr("pipeline.plan.shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(RecipeError, match="all that is free there"):
        plan(make_recipe())


def test_planning_needs_no_ray_and_no_torch():
    text = Path("pipeline/plan.py").read_text() + Path("pipeline/estimate.py").read_text()
    assert "import ray" not in text
    assert "import torch" not in text
