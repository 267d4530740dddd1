import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from pipeline.errors import ModelError, RecipeError
from student.model.prune import evenly_spaced_layers, prune_checkpoint, prune_config, resolve_layers

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
}


def saved_model(folder, model_type="llama", **values):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **values)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.mark.parametrize(
    ("kept", "layers", "expected"),
    [
        (1, 30, (0,)),
        (2, 30, (0, 29)),
        (3, 5, (0, 2, 4)),
        (4, 4, (0, 1, 2, 3)),
        (10, 30, (0, 3, 6, 10, 13, 16, 19, 23, 26, 29)),
    ],
)
def test_layers_are_evenly_spaced_with_both_ends(kept, layers, expected):
    assert evenly_spaced_layers(kept, layers) == expected


def test_evenly_spaced_layers_are_distinct():
    for layers in range(1, 40):
        for kept in range(1, layers + 1):
            assert len(set(evenly_spaced_layers(kept, layers))) == kept


@pytest.mark.parametrize("requested", [0, 7, (), (2, 1), (0, 0), (-1, 2), (0, 6)])
def test_layers_that_the_teacher_does_not_have_are_refused(requested):
    with pytest.raises(RecipeError, match=r"student\.layers"):
        resolve_layers(requested, 6)


@pytest.mark.parametrize("tied", [True, False])
def test_a_pruned_checkpoint_has_the_chosen_layers_bit_by_bit(tmp_path, tied):
    source = saved_model(tmp_path / "teacher", num_hidden_layers=6, tie_word_embeddings=tied, **TINY)
    prune_checkpoint(source, (0, 3, 5), tmp_path / "pruned")
    teacher = AutoModelForCausalLM.from_pretrained(source)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert student.config.num_hidden_layers == 3
    for new, old in enumerate((0, 3, 5)):
        for name, parameter in student.model.layers[new].named_parameters():
            assert torch.equal(parameter, teacher.model.layers[old].get_parameter(name)), name
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    assert torch.equal(student.model.norm.weight, teacher.model.norm.weight)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied


def test_models_with_other_layer_names_are_pruned_too(tmp_path):
    values = {"n_embd": 32, "n_layer": 5, "n_head": 4, "vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2}
    source = saved_model(tmp_path / "teacher", "gpt2", **values)
    prune_checkpoint(source, (1, 4), tmp_path / "pruned")
    teacher = AutoModelForCausalLM.from_pretrained(source)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert student.config.num_hidden_layers == 2
    assert torch.equal(student.transformer.h[1].mlp.c_fc.weight, teacher.transformer.h[4].mlp.c_fc.weight)


def test_keeping_every_layer_reproduces_the_teacher(tmp_path):
    source = saved_model(tmp_path / "teacher", num_hidden_layers=3, **TINY)
    prune_checkpoint(source, (0, 1, 2), tmp_path / "pruned")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected, got = (
            AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (source, tmp_path / "pruned")
        )
    assert torch.equal(expected, got)


def test_config_lists_with_an_item_per_layer_are_pruned():
    config = LlamaConfig(num_hidden_layers=4, **TINY)
    config.layer_flavours = ["a", "b", "c", "d"]
    config.other = ["x", "y"]
    pruned = prune_config(config, (0, 3))
    assert (pruned.num_hidden_layers, pruned.layer_flavours, pruned.other) == (2, ["a", "d"], ["x", "y"])


def test_sliding_and_full_attention_layers_keep_their_type(tmp_path):
    values = TINY | {"num_hidden_layers": 6, "sliding_window_pattern": 3, "head_dim": 8}
    source = saved_model(tmp_path / "teacher", "gemma3_text", **values)
    kinds = AutoConfig.from_pretrained(source).layer_types
    prune_checkpoint(source, (1, 2, 5), tmp_path / "pruned")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert student.config.layer_types == [kinds[1], kinds[2], kinds[5]]


def test_only_the_kept_tensors_are_written(tmp_path):
    source = saved_model(tmp_path / "teacher", num_hidden_layers=6, **TINY)
    prune_checkpoint(source, (0, 5), tmp_path / "pruned")
    index = json.loads((tmp_path / "pruned" / "model.safetensors.index.json").read_text())["weight_map"]
    written = {key for file in (tmp_path / "pruned").glob("*.safetensors") for key in safe_open(file, "pt").keys()}  # noqa: SIM118
    assert written == set(index)
    assert {key.split(".")[2] for key in written if ".layers." in key} == {"0", "1"}


def test_a_checkpoint_without_a_kept_layer_is_refused(tmp_path):
    source = saved_model(tmp_path / "teacher", num_hidden_layers=2, **TINY)
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 4}))
    with pytest.raises(ModelError, match=r"expected tensors of layers \[3\], got none"):
        prune_checkpoint(source, (0, 3), tmp_path / "pruned")
