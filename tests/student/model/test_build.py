import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config import LoraSpec, TrainingSpec
from pipeline.errors import ModelError, RecipeError
from student.model.build import Student, build_student, check_packing, head_spec, load_model, prepare_for_training
from student.release.final import merge_lora

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 60,
}
FAMILIES = {
    "llama": SIZES,
    "qwen2": SIZES,
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 60, "bos_token_id": 0, "eos_token_id": 0},
    "gemma2": SIZES | {"head_dim": 8, "sliding_window": 4, "pad_token_id": 0},
    "olmo2": SIZES,
}


def student_of(family="llama", **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family] | changes)
    return Student(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())


def packed(*lengths):
    ids = torch.randint(0, 60, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    return ids, torch.cat([torch.arange(length) for length in lengths])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_have_the_same_states_as_alone(family):
    student, (ids, positions) = student_of(family), packed(5, 1, 9, 2)
    layers = (-1, 0, 1, 3)
    together, seen = student.states(ids, positions, layers)
    for start, end in ((0, 5), (5, 6), (6, 15), (15, 17)):
        alone, alone_seen = student.states(ids[start:end], torch.arange(end - start), layers)
        assert torch.allclose(together[start:end], alone, atol=1e-5)
        for layer in layers:
            assert torch.allclose(seen[layer][start:end], alone_seen[layer], atol=1e-5), layer


def test_layers_are_numbered_as_in_the_contract():
    student, (ids, positions) = student_of(), packed(6)
    last, seen = student.states(ids, positions, (-1, 0, 1, 2, 3))
    with torch.no_grad():
        expected = student.model(ids[None], output_hidden_states=True).hidden_states
    for layer in (0, 1, 2):
        assert torch.allclose(seen[layer], expected[layer][0], atol=1e-6)
    assert torch.allclose(student.model.model.norm(seen[3]), expected[3][0], atol=1e-6)
    assert torch.equal(seen[-1], last)


def test_head_and_head_spec_give_the_logits_of_the_model():
    for family in FAMILIES:
        student, (ids, positions) = student_of(family), packed(6)
        spec = head_spec(student.model.config)
        weight, bias = student.head()
        state, _ = student.states(ids, positions)
        logits = spec.scale * torch.nn.functional.linear(state, weight, bias)
        if spec.soft_cap is not None:
            logits = spec.soft_cap * torch.tanh(logits / spec.soft_cap)
        assert torch.allclose(logits, student.model(ids[None]).logits[0], atol=1e-5), family


def test_a_model_that_ignores_position_ids_is_refused():
    config = AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=2, vocab_size=60)
    with pytest.raises(ModelError, match="a packed sequence depends on the one before"):
        check_packing(Student(AutoModelForCausalLM.from_config(config, dtype=torch.float32)))


def test_activation_checkpointing_changes_no_gradient():
    ids, positions = packed(5, 7)
    gradients = []
    for checkpointing in (False, True):
        student = student_of().train()
        prepare_for_training(student, TrainingSpec(activation_checkpointing=checkpointing))
        state, seen = student.states(ids, positions, (1,))
        (state.square().sum() + seen[1].sum()).backward()
        gradients.append([p.grad for p in student.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_parameters_with_a_frozen_prefix_need_no_gradient():
    student = student_of()
    prepare_for_training(student, TrainingSpec(freeze=("model.embed_tokens", "model.layers.0")))
    frozen = {name for name, p in student.model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in student.model.named_parameters() if n.startswith(("model.embed", "model.layers.0"))}
    with pytest.raises(RecipeError, match=r"training\.freeze: expected a prefix of parameter names such as model\."):
        prepare_for_training(student, TrainingSpec(freeze=("no_such",)))
    with pytest.raises(RecipeError, match="a parameter left to train"):
        prepare_for_training(student, TrainingSpec(freeze=("model", "lm_head")))


def test_only_lora_parameters_are_trained_and_they_merge_into_the_weights():
    student, (ids, positions) = student_of(), packed(6)
    before = student.states(ids, positions)[0].detach()
    prepare_for_training(student, TrainingSpec(lora=LoraSpec(rank=2)))
    trained = [name for name, p in student.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    changed = student.states(ids, positions)[0].detach()
    assert not torch.allclose(before, changed, atol=1e-3)
    merge_lora(student.model)
    assert torch.allclose(student.states(ids, positions)[0], changed, atol=1e-4)
    assert not any("lora" in name for name, _ in student.model.named_parameters())


def test_a_lora_target_that_does_not_exist_is_refused():
    with pytest.raises(RecipeError, match=r"training\.lora\.targets"):
        prepare_for_training(student_of(), TrainingSpec(lora=LoraSpec(targets=("nothing",))))


def test_a_student_is_built_from_a_teachers_layers(small_run, tmp_path):
    student_of("llama", num_hidden_layers=4).model.save_pretrained(tmp_path / "teacher")
    teachers = [{"name": "real", "model": str(tmp_path / "teacher"), "engine": "transformers"}]
    recipe = small_run.recipe(teachers=teachers, student={"from_teacher": "real", "layers": [0, 3]})
    model = build_student(recipe.all_students[0], recipe, 60)
    teacher = load_model(tmp_path / "teacher")
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, teacher.model.layers[3].mlp.up_proj.weight)


def test_a_student_from_a_config_takes_the_caches_vocabulary_and_depends_on_the_seed(small_run):
    recipe = small_run.recipe(student={"config": {"model_type": "llama", **SIZES} | {"vocab_size": 77}, "seed": 3})
    again = small_run.recipe(student={"config": {"model_type": "llama", **SIZES} | {"vocab_size": 77}, "seed": 4})
    first, same, other = (build_student(r.all_students[0], r, 300) for r in (recipe, recipe, again))
    assert first.lm_head.weight.shape[0] == 77
    assert torch.equal(first.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert build_student(small_run.recipe().all_students[0], small_run.recipe(), 300).lm_head.weight.shape[0] == 300


@pytest.mark.parametrize(
    ("config", "message"),
    [({"model_type": "nothing"}, "transformers cannot build it"), ({"hidden_size": 4}, "transformers cannot build it")],
)
def test_an_unknown_config_is_refused(small_run, config, message):
    recipe = small_run.recipe(student={"config": config})
    with pytest.raises(RecipeError, match=message):
        build_student(recipe.all_students[0], recipe, 300)


def test_a_checkpoint_that_transformers_cannot_load_is_refused_in_one_line(tmp_path):
    student_of().model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": "nothing"}))
    with pytest.raises(ModelError, match="transformers cannot load it") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)
