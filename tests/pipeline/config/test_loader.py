"""Loading of recipes, and the messages for mistakes in them."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import Recipe, load_recipe, recipe_from_dict, recipe_from_job_dict
from pipeline.config.explain import RENAMED_KEYS
from pipeline.config.loader import RECIPES
from pipeline.errors import RecipeError

GOOD = """\
name: tiny
storage: runs/tiny
corpus: {source: python-docs}
teachers:
  - {name: t, model: dummy, engine: dummy}
student: {from_teacher: t, layers: 2}
training:
  workers: 1
  learning_rate: 1e-4
"""


def recipe(folder: Path, text: str) -> Recipe:
    path = folder / "r.yaml"
    path.write_text(text)
    return load_recipe(str(path))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_round_trips_through_json(path: Path) -> None:
    loaded = load_recipe(path.stem)
    assert loaded.name == path.stem
    assert recipe_from_dict(json.loads(json.dumps(loaded.to_dict()))) == loaded


def test_an_exponent_without_a_decimal_point_is_a_number(tmp_path: Path) -> None:
    assert recipe(tmp_path, GOOD).training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("workers: 1", "wrokers: 1", "recipe r.yaml:8 training.wrokers: unknown key, did you mean workers?"),
        ("workers: 1", "workers: many", 'recipe r.yaml:8 training.workers: expected an integer, got "many"'),
        ("workers: 1", "workers: 1\n  workers: 2", "recipe r.yaml:9 training.workers: duplicate key, first in line 8"),
        ("workers: 1", "workers: no", 'recipe r.yaml:8 training.workers: expected an integer, got "no"'),
        ("engine: dummy", "engine: tgi", "recipe r.yaml:5 teachers[0].engine: expected vllm, transformers or dummy"),
        ("name: t,", "name: ../t,", "recipe r.yaml:5 teachers[0].name: expected 1 to 128 of A-Z a-z 0-9"),
        (
            "engine: dummy}",
            "engine: vllm, pipeline_parallel: 2}\ncapture: {hidden_layers: [3, -1]}",
            "capture.hidden_layers: expected -1 alone, since teacher t has pipeline_parallel 2",
        ),
        (
            "engine: dummy}",
            "engine: vllm, tensor_parallel: 2, placement: {gpus: 2.0}}",
            "placement.gpus: expected at most 1 for each of several ranks, got 2.0",
        ),
        ("from_teacher: t", "from_teacher: u", "recipe r.yaml:6 student.from_teacher: expected one of ['t'], got 'u'"),
        (
            "layers: 2}\ntraining:",
            "layers: [0, 1, 4]}\ntraining:\n  feature: {layer_gap_least_squares: true}",
            "hidden_layers: expected the states [4] that training.feature.layer_gap_least_squares needs, got []",
        ),
        (
            "from_teacher: t, layers: 2}\ntraining:",
            "checkpoint: a/b}\ntraining:\n  feature: {layer_gap_least_squares: true}",
            "r.yaml:8 training.feature.layer_gap_least_squares: expected students made of the first teacher's layers "
            "(from_teacher: t), got student with None",
        ),
        ("engine: dummy}", "engine: dummy, replicas: 0}", "recipe r.yaml:5 teachers[0].replicas: expected 1 <= min"),
        ("workers: 1", "tokens_per_step: 8", "recipe r.yaml:7 training.tokens_per_batch: expected at most tokens_per_"),
        ("\n  - {name: t, model: dummy, engine: dummy}", " []", "r.yaml:4 teachers: expected at least 1 of them"),
        ("storage: runs/tiny", "storage: ''", "recipe r.yaml:2 storage: expected at least 1 character(s), got none"),
        ("{source: python-docs}", "[]", "recipe r.yaml:3 corpus: expected keys with values, got []"),
        ("workers: 1", "betas: 1", "recipe r.yaml:8 training.betas: expected a list, got 1"),
        ("layers: 2", "layer: 2", "recipe r.yaml:6 student.layer: unknown key, did you mean layers?"),
        ("name: tiny", "name: tiny\n\tx: 1", "recipe r.yaml:2: not valid YAML"),
        ("name: tiny", "name: &a tiny\nother: *a", "recipe r.yaml:2: not valid YAML: aliases are not allowed"),
        ("name: tiny", "name: !!python/object:os.system tiny", "recipe r.yaml:1: not valid YAML"),
        ("storage: runs/tiny\n", "", "recipe r.yaml storage: expected a value, got none"),
    ],
)
def test_an_error_is_one_line_with_file_line_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(RecipeError) as error:
        recipe(tmp_path, GOOD.replace(old, new))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["unbiased", "sampled"])
def test_any_temperature_is_refused_for_modes_without_a_tail(mode: str) -> None:
    overrides = ["capture.any_temperature=true", f"capture.mode={mode}"]
    with pytest.raises(RecipeError, match=f"any_temperature.*: expected mode topk or topp, .*got {mode}"):
        load_recipe("quickstart", overrides)
    assert load_recipe("quickstart", overrides[:1]).capture.any_temperature


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ("losses: {kd: 1.0e+999}", "training.losses.kd: expected a finite number, got Infinity"),
        ("losses: {kd: -0.1}", "training.losses.kd: expected greater than or equal to 0, got -0.1"),
        ("losses: {kd: {value: -1.0}}", "training.losses.kd.value: expected greater than or equal to 0, got -1.0"),
        ("losses: {ce: {value: 1, final: 2}}", "final: expected with kind linear, cosine or wsd, got 2 with constant"),
        ("distribution: {loss: {}}", "training.distribution.loss: expected a name, or names with weights, got none"),
        ("distribution: {loss: {forward_kl: -1}}", "loss.forward_kl: expected greater than or equal to 0, got -1"),
        ("selection: {by: random, threshold: 1.0}", "threshold: expected with by: teacher_entropy, got by: random"),
        ("selection: {share: 0.5}", "share: expected 1 with by: all, got 0.5"),
        ("selection: {by: teacher_entropy, threshold: 1.0, share: 0.5}", "share: expected 1 with a threshold, got 0.5"),
        ("selection: {by: random, how: weigh}", "how: weigh: expected by: student_entropy, ce_ratio"),
        ("selection: {by: label_cost, how: weigh, share: 0.5}", "share: expected 1 with weigh, got 0.5"),
        ("selection: {sequences: {reference: u}}", "sequences.reference: expected one of several teachers, got 'u'"),
        ("selection: {sequences: {reference: t}}", "sequences.reference: expected one of several teachers, got 't'"),
        ("fusion: {weights: {law:u: 1.0}}", "training.fusion.weights: expected names out of ['t'], got 'u'"),
        (
            "fusion: {how: route, by_domain: {law: u}}",
            "training.fusion.by_domain: expected names out of ['t'], got 'u'",
        ),
    ],
)
def test_invalid_training_settings_are_one_line(tmp_path: Path, training: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(tmp_path, GOOD + f"  {training}\n")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_several_weighted_divergences_round_trip_through_json(tmp_path: Path) -> None:
    text = "  distribution: {loss: {forward_kl: 1, reverse_kl: {value: 0.5, kind: linear, final: 2}}}\n"
    loaded = recipe(tmp_path, GOOD + text)
    assert list(loaded.training.distribution.weights) == ["forward_kl", "reverse_kl"]
    assert recipe_from_dict(json.loads(json.dumps(loaded.to_dict()))) == loaded


@pytest.mark.parametrize("data", [b"", b"- a list", b"just text", b"\xff\xfe", b"a: [", b"x" * (1 << 21), b"a: \x00"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    with pytest.raises(RecipeError):
        load_recipe(str(path))


@pytest.mark.parametrize(
    "override", ["training", "=3", "teachers[7].name=x", "training.workers.deep=1", "seed=[", "seed=1.5"]
)
def test_an_override_of_an_unknown_place_or_type_is_refused(override: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe("quickstart", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.workers=many", 'override training.workers=many: expected an integer, got "many"'),
        ("training={workers: many}", "override training={workers: many} training.workers: expected an integer"),
        ("teachers.0.engine=tgi", "override teachers.0.engine=tgi: expected vllm"),
        ("training.wrokers=1", "override training.wrokers=1: unknown key, did you mean workers?"),
        ("training.tokens_per_step=8", "recipe r.yaml:7 training.tokens_per_batch: expected at most"),
    ],
)
def test_an_error_names_the_override_instead_of_the_line_that_it_replaces(
    tmp_path: Path, override: str, message: str
) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)
    with pytest.raises(RecipeError) as error:
        load_recipe(str(tmp_path / "r.yaml"), [override])
    assert str(error.value).startswith(message)


def test_a_recipe_from_a_job_file_keeps_the_locations_of_its_keys(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)
    job = json.loads(json.dumps(load_recipe(str(tmp_path / "r.yaml"), ["seed=3"]).to_job_dict()))
    recipe = recipe_from_job_dict(job)
    assert recipe.location("training.learning_rate") == "recipe r.yaml:9 training.learning_rate"
    assert recipe.location("training.lora.rank") == "recipe r.yaml:7 training.lora.rank"
    assert recipe.location("teachers[0].model") == "recipe r.yaml:5 teachers[0].model"
    assert recipe.location("seed") == "override seed=3"
    assert recipe.add_location("training.learning_rate: too high") == "recipe r.yaml:9 training.learning_rate: too high"
    assert recipe.add_location("teacher t: too large") == "teacher t: too large"


def test_overrides_set_items_of_lists() -> None:
    changed = load_recipe("quickstart", ["teachers[0].replicas=[1, 3]", "training.losses.kd=1", "seed=7"])
    assert changed.teachers[0].replica_range == (1, 3)
    assert (changed.training.losses.kd, changed.seed) == (1.0, 7)


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_a_renamed_key_is_refused_with_its_new_name(tmp_path: Path, old: str, new: str) -> None:
    *parents, key = old.split(".")
    values = load_recipe("dummy").to_dict()
    section = values
    for parent in parents:
        section = section[parent]
    section[key] = section[new.rpartition(".")[2]]
    refused_with = re.escape(f"{old}: this key is now called {new}")
    with pytest.raises(RecipeError, match=rf"^recipe dummy {refused_with}$"):
        recipe_from_dict(values)
    (tmp_path / "recipe.json").write_text(json.dumps(values, indent=2))
    with pytest.raises(RecipeError, match=rf"^recipe recipe\.json:\d+ {refused_with}$"):
        load_recipe(str(tmp_path / "recipe.json"))
    with pytest.raises(RecipeError, match=f"^override {re.escape(old)}=true: this key is now called {re.escape(new)}$"):
        load_recipe("dummy", [f"{old}=true"])


def test_an_unknown_recipe_name_lists_those_that_ship() -> None:
    with pytest.raises(RecipeError, match="quickstart"):
        load_recipe("quikstart")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.config.loader._read", lambda path: text)
        message = ""
        try:
            load_recipe("quickstart")
        except RecipeError as error:
            message = str(error)
    assert "\n" not in message
