"""`generate` mode: a teacher answers the prompts, then scores its own answers as it scores any text."""

import json

import pytest

from actors.capture import capture
from actors.generate import answer_prompts
from actors.generate.answer_prompts import prepare_caches
from actors.generate.generation_work import BATCH_PROMPTS
from pipeline.cache.storage.layout import GENERATED, MANIFEST_JSON
from pipeline.cache.storage.store import Store
from pipeline.cache.unit_list import UnitList
from pipeline.config import recipe_from_dict
from pipeline.corpus.prepare import prepare_cache
from pipeline.errors import CorpusError, ExitCode, UsageError
from pipeline.models.tokenizers import ByteTokenizer

SAMPLING = {"temperature": 0.8, "max_tokens": 12, "seed": 5}
CHAT = {"text": None, "messages": [{"role": "user", "content": "What is oak?"}]}
pytestmark = pytest.mark.usefixtures("two_cpus_of_ray")


@pytest.fixture
def make_recipe(tmp_path):
    def make(rows=None, *, storage="run", source=None, max_tokens=None, **teacher):
        prompts = tmp_path / "prompts.jsonl"
        rows = rows or [{"id": f"d{i}", "text": f"Question {i}: "} for i in range(40)]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        base = {"name": "a", "model": "dummy", "engine": "dummy", "replicas": 2, "options": {"vocabulary": 300}}
        return recipe_from_dict(
            {
                "name": "t",
                "storage": str(tmp_path / storage),
                "corpus": {"source": source or str(prompts), "sequence_length": 64, "max_tokens": max_tokens},
                "teachers": [{**base, "sampling": SAMPLING, **teacher}],
                "capture": {"k": 4, "unit_sequences": 4},
            }
        )

    return make


def generate(recipe):
    """Prepare the caches, but score nothing."""
    prepare_caches(recipe, recipe.teachers)


def rows_of(recipe):
    units = UnitList.open(Store.open(recipe.cache_uri("a")))
    rows = [row for unit_id in units.unit_ids() for row in units.read(unit_id).sequences]
    assert all(row.document_id.endswith("@a") for row in rows)
    return {row.document_id.removesuffix("@a"): row for row in rows}


def files_of(recipe):
    return Store.open(recipe.cache_uri("a")).list(GENERATED)


def labels(sequence):
    return ByteTokenizer().decode(sequence.input_ids_N[sequence.loss_mask_N == 1])


def test_answers_are_generated_scored_and_alone_have_labels(make_recipe, capsys):
    recipe = make_recipe()
    assert capture(recipe, recipe.teachers) is ExitCode.DONE
    assert json.loads(Store.open(recipe.cache_uri("a")).read(MANIFEST_JSON))["rows"] == 40
    assert "generate a: 40 prompts answered" in capsys.readouterr().err
    rows = rows_of(recipe)
    assert set(rows) == {f"d{i}" for i in range(40)}
    for name, sequence in rows.items():
        assert ByteTokenizer().decode(sequence.input_ids_N) == f"Question {name[1:]}: {labels(sequence)}"
        assert 11 <= len(labels(sequence)) <= 12
    assert len({labels(sequence) for sequence in rows.values()}) == 40


def test_a_chat_ends_its_turn_only_where_the_teacher_did(make_recipe):
    recipe = make_recipe([{**CHAT, "id": f"c{i}"} for i in range(12)])
    generate(recipe)
    ends = {
        sequence.input_ids_N[sequence.loss_mask_N == 1][-1] == ByteTokenizer.END_OF_MESSAGE
        for sequence in rows_of(recipe).values()
    }
    assert ends == {True, False}
    assert all("What" not in labels(sequence) for sequence in rows_of(recipe).values())


def test_an_interrupted_run_continues_after_the_last_file(make_recipe, capsys):
    whole = make_recipe(storage="whole")
    generate(whole)
    recipe = make_recipe()
    first, second = files_of(whole)
    store = Store.open(recipe.cache_uri("a"))
    store.put(first, Store.open(whole.cache_uri("a")).read(first))
    capsys.readouterr()
    generate(recipe)
    assert f"generate a: {40 - BATCH_PROMPTS} prompts answered" in capsys.readouterr().err
    assert store.read(second) == Store.open(whole.cache_uri("a")).read(second)


def test_when_all_answers_exist_ray_is_not_started(make_recipe, monkeypatch):
    whole, recipe = make_recipe(storage="whole"), make_recipe()
    generate(whole)
    for path in files_of(whole):
        Store.open(recipe.cache_uri("a")).put(path, Store.open(whole.cache_uri("a")).read(path))
    monkeypatch.setattr(answer_prompts, "ray_session", None)
    generate(recipe)
    assert {name: labels(row) for name, row in rows_of(recipe).items()} == {
        name: labels(row) for name, row in rows_of(whole).items()
    }


def test_no_answers_are_generated_past_the_corpus_cap(make_recipe):
    rows = [{"id": f"d{i}", "text": f"Question {i}: "} for i in range(20 * BATCH_PROMPTS)]
    recipe = make_recipe(rows, max_tokens=200)
    generate(recipe)
    assert len(files_of(recipe)) < 10


def test_other_sampling_generates_anew(make_recipe):
    recipe, warmer = make_recipe(), make_recipe(storage="warm", sampling={**SAMPLING, "seed": 6})
    generate(recipe)
    generate(warmer)
    assert not set(files_of(recipe)) & set(files_of(warmer))
    assert {labels(row) for row in rows_of(recipe).values()} != {labels(row) for row in rows_of(warmer).values()}


def test_another_teacher_scores_these_answers(make_recipe):
    recipe = make_recipe()
    generate(recipe)
    folder = Store.open(recipe.cache_uri("a")).where(GENERATED)
    other = make_recipe(storage="other", source=folder, sampling=None, options={"vocabulary": 300, "seed": 1})
    assert capture(other, other.teachers) is ExitCode.DONE
    ours, theirs = rows_of(recipe), rows_of(other)
    assert {name: labels(row) for name, row in ours.items()} == {name: labels(row) for name, row in theirs.items()}


def test_a_chat_that_is_answered_already_is_refused(make_recipe):
    answer = {"role": "assistant", "content": "A tree."}
    recipe = make_recipe([{"id": "c", "messages": [*CHAT["messages"], answer]}])
    with pytest.raises(CorpusError, match="document 'c': expected a chat that ends with the user's turn"):
        generate(recipe)


def test_prompts_without_answers_are_refused(make_recipe):
    recipe = make_recipe()
    with pytest.raises(UsageError, match="stillhouse capture"):
        prepare_cache(recipe, recipe.teachers[0])
