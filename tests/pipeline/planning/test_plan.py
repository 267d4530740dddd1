import json
import subprocess
import sys

import numpy as np
import psutil
import pytest

from pipeline.cache.format.schema import ShardSpec
from pipeline.config import TeacherSpec, recipe_from_dict
from pipeline.contracts import CaptureSpec, TargetMode
from pipeline.corpus.answers import append_answer
from pipeline.corpus.prepare import prepare_cache
from pipeline.errors import CorpusError, EngineError, RecipeError
from pipeline.models.tokenizers import ByteTokenizer
from pipeline.planning.estimate import column_bytes, kv_bytes_per_token, raw_bytes_per_token, weights_bytes
from pipeline.planning.plan import pays_off_after, plan
from pipeline.planning.resources import Machine, Placement, concurrent_replicas
from pipeline.planning.token_counts import Counts


@pytest.fixture
def make_recipe(tmp_path):
    def make(teacher=None, **more):
        text = tmp_path / "text.jsonl"
        lines = [{"id": f"d{i}", "text": f"document {i} " * 20} for i in range(30)]
        text.write_text("".join(json.dumps(line) + "\n" for line in lines))
        base = {"name": "a", "model": "dummy", "engine": "dummy"}
        return recipe_from_dict(
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
    pair = plan(make_recipe({"replicas": 2}, cluster={"cpus": 2}), tokens_per_s=100.0).teachers[0]
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
    spec = {"name": "a", "model": "m", "dtype": "bfloat16"}
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


def test_a_replica_that_no_machine_here_could_hold_is_refused(make_recipe):
    with pytest.raises(RecipeError, match="asks for 64 CPU, expected at most 2"):
        plan(make_recipe({"replicas": 64, "placement": {"cpus": 64.0}}, cluster={"cpus": 2}))
    with pytest.raises(RecipeError, match="asks for 1 rack, expected at most 0"):
        plan(make_recipe({"placement": {"resources": {"rack": 1.0}}}))


def test_replicas_that_wait_for_a_place_do_not_make_it_faster(make_recipe):
    (teacher,) = plan(make_recipe({"replicas": 64}, cluster={"cpus": 2}), tokens_per_s=100.0).teachers
    assert teacher.replicas == teacher.counts.units > 2
    assert teacher.at_a_time == 2
    assert teacher.hours == pytest.approx(teacher.counts.total_tokens / 100.0 / 2 / 3600)
    assert f"{teacher.replicas}, 2 at a time" in str(teacher)


def test_places_go_to_teachers_in_turn():
    single, double = Placement(1.0, 0.0), Placement(2.0, 0.0)
    assert concurrent_replicas({"a": single, "b": double}, {"a": 8, "b": 8}, {"CPU": 6.0}) == {"a": 2, "b": 2}
    assert concurrent_replicas({"a": single, "b": double}, {"a": 1, "b": 8}, {"CPU": 2.0}) == {"a": 1, "b": 0}


@pytest.mark.parametrize(("cpus", "fits"), [(2, True), (4, False)])
def test_the_memory_of_replicas_concurrent_replicas_counts_and_of_those_that_wait_does_not(
    make_recipe, monkeypatch, cpus, fits
):
    machine = Machine(float(cpus), 5 << 29, ())  # two and a half times what a runtime takes
    monkeypatch.setattr("pipeline.planning.plan.Machine.local", lambda cluster: machine)
    recipe = make_recipe({"replicas": 4})
    if fits:
        assert plan(recipe).teachers[0].at_a_time == 2
        return
    with pytest.raises(RecipeError, match=r"replicas that run at a time \(4 of teacher a .*\), expected at most"):
        plan(recipe)


def save_model(folder):
    """A model whose files say: 2 layers, 64 wide, a byte's vocabulary, and 1 MB of weights in bfloat16."""
    from safetensors.numpy import save_file

    folder.mkdir()
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320}
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **sizes}))
    save_file({"w": np.zeros(500_000, np.float16)}, folder / "model.safetensors")
    for name, data in ByteTokenizer().files().items():
        (folder / name).write_bytes(data)
    return {"model": str(folder), "engine": "vllm", "dtype": "bfloat16", "chunk_rows": 16, "kv_cache_gib": 0.1}


@pytest.mark.parametrize(
    ("teacher", "gpu_bytes", "fits"),
    [
        ({}, 2_000_000, True),
        ({}, 1_000_000, False),
        ({"placement": {"gpus": 0.5}}, 2_000_000, False),
        ({"tensor_parallel": 2}, 1_000_000, True),
    ],
    ids=["whole", "small", "half", "two ranks"],
)
def test_what_does_not_fit_on_a_gpu_is_refused(make_recipe, monkeypatch, tmp_path, teacher, gpu_bytes, fits):
    machine = Machine(4.0, 1 << 40, (gpu_bytes, gpu_bytes))
    monkeypatch.setattr("pipeline.planning.plan.Machine.local", lambda cluster: machine)
    recipe = make_recipe({**save_model(tmp_path / "model"), **teacher})
    if fits:
        assert 500_000 < plan(recipe).teachers[0].gpu_bytes_per_rank < gpu_bytes
        return
    with pytest.raises(RecipeError, match=r"a rank takes .* of its GPU, expected at most"):
        plan(recipe)


def test_answers_that_are_not_written_yet_count_at_their_longest(make_recipe):
    recipe = make_recipe({"sampling": {"max_tokens": 90}})
    (teacher,) = plan(recipe, tokens_per_s=10.0).teachers

    def longest(prompts):
        return (append_answer(prompt, "x" * 90, "a", finished=True) for prompt in prompts)

    assert teacher.counts.total_tokens == prepare_cache(recipe, recipe.teachers[0], longest).tokens
    assert "at most: answers count at their maximum length" in str(teacher)
    assert "plus the generation of the answers" in str(teacher)


def test_a_probe_measures_the_pace(make_recipe):
    recipe = make_recipe({"options": {"delay_s_per_token": 0.002}})
    (teacher,) = plan(recipe, probe=True).teachers
    assert 50 < teacher.tokens_per_s < 500
    assert teacher.hours == pytest.approx(teacher.counts.total_tokens / teacher.tokens_per_s / 3600)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_message_of_a_failed_probe_is_its_jobs_error(make_recipe, monkeypatch, log_format):
    monkeypatch.setenv("STILLHOUSE_LOG_FORMAT", log_format)
    with pytest.raises(EngineError, match="probe of teacher a: injected fault: engine died"):
        plan(make_recipe({"options": {"dead_every": 1}}), probe=True)


def test_more_bytes_than_the_disk_has_free_are_refused(make_recipe, monkeypatch):
    monkeypatch.setattr("pipeline.planning.plan.shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(RecipeError, match="which is free there"):
        plan(make_recipe())


def test_a_corpus_of_no_tokens_is_refused(make_recipe, tmp_path):
    recipe = make_recipe()
    (tmp_path / "text.jsonl").write_text('{"id": "a", "text": "x"}')
    with pytest.raises(CorpusError, match="expected at least one sequence of two tokens"):
        plan(recipe)


def test_planning_needs_no_ray_and_no_torch():
    heavy = (
        "import sys, pipeline.planning.plan; print(sorted({'ray', 'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout == "[]\n"
