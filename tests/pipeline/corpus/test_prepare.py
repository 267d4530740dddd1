import json
import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.cache.description import read_identity
from pipeline.cache.unit_list import UnitList
from pipeline.config import recipe_from_dict
from pipeline.corpus.prepare import check_cache_identity, prepare_cache
from pipeline.errors import CorpusError, IdentityError, ModelError, RecipeError, StorageError
from pipeline.models.tokenizers import ByteTokenizer, load_tokenizer

DUMMY = {"name": "dummy", "model": "dummy", "engine": "dummy"}


def recipe_of(tmp_path, *, teacher=None, **changes):
    corpus = tmp_path / "corpus.jsonl"
    if not corpus.exists():
        rows = ({"id": f"doc {n}", "text": f"document {n}: " + "text " * 20} for n in range(30))
        corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "name": "test",
        "storage": str(tmp_path / "run"),
        "corpus": {"source": str(corpus), "sequence_length": 32, "held_out": 0.2, **changes.pop("corpus", {})},
        "teachers": [{**DUMMY, **(teacher or {})}],
        "capture": {"k": 8, "unit_sequences": 4, **changes.pop("capture", {})},
        **changes,
    }
    return recipe_from_dict(values)


def prepare(recipe):
    return prepare_cache(recipe, recipe.teachers[0])


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLHOUSE_HOME", str(tmp_path / "home"))


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    config = {"model_type": "llama", "vocab_size": 300, "num_hidden_layers": 6, "max_position_embeddings": 64}
    (path / "config.json").write_text(json.dumps(config))
    save_file({"w": np.zeros(4, np.float32)}, path / "model.safetensors")
    for name, data in ByteTokenizer().files().items():
        (path / name).write_bytes(data)
    return path


def test_a_cache_is_prepared_with_its_units_and_tokenizer(tmp_path):
    prepared = prepare(recipe_of(tmp_path))
    assert prepared.store.uri == str(tmp_path / "run" / "caches" / "dummy")
    assert prepared.model is None
    units = UnitList.open(prepared.store)
    sequences = [s for unit_id in prepared.unit_ids for s in units.read(unit_id).sequences]
    assert sum(len(s.input_ids_N) for s in sequences) == prepared.tokens
    assert {s.split for s in sequences} == {"train", "held_out"}
    assert isinstance(load_tokenizer(prepared.store.local_path() / "tokenizer"), ByteTokenizer)


def test_a_second_preparation_changes_nothing_and_does_not_tokenise(tmp_path, monkeypatch):
    first = prepare(recipe_of(tmp_path))
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    monkeypatch.setattr(ByteTokenizer, "encode", lambda *_, **__: pytest.fail("tokenised again"))
    assert prepare(recipe_of(tmp_path)) == first
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == files


def test_an_interrupted_preparation_is_completed_by_the_next(tmp_path, monkeypatch):
    class Interrupted(Exception):
        pass

    def interrupt(*_):
        raise Interrupted

    monkeypatch.setattr("pipeline.corpus.prepare.write_cache_identity", interrupt)
    with pytest.raises(Interrupted):
        prepare(recipe_of(tmp_path))
    monkeypatch.undo()
    first = prepare(recipe_of(tmp_path))
    second = prepare(recipe_of(tmp_path, storage=str(tmp_path / "undisturbed")))
    assert (first.fingerprint, first.unit_ids) == (second.fingerprint, second.unit_ids)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"capture": {"k": 9}}, "capture.k: got 9, expected 8"),
        ({"capture": {"unit_sequences": 5}}, "unit_sequences: got 5, expected 4"),
        ({"capture": {"audit": 0.5}}, "audit: got 0.5, expected 0.02"),
        ({"seed": 1}, "corpus.split_seed: got 1, expected 0"),
        ({"corpus": {"sequence_length": 16}}, "corpus.sequence_length: got 16, expected 32"),
        ({"corpus": {"held_out": 0.5}}, "corpus.held_out: got 0.5, expected 0.2"),
        ({"teacher": {"dtype": "float32"}}, 'teacher.dtype: got "float32", expected "bfloat16"'),
        ({"teacher": {"options": {"seed": 3}}}, "teacher.options.seed: got 3, expected nothing"),
    ],
)
def test_another_identity_is_refused_with_the_fields_that_differ(tmp_path, change, field):
    prepare(recipe_of(tmp_path))
    with pytest.raises(IdentityError) as caught:
        prepare(recipe_of(tmp_path, **change))
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"capture": {"quarantine_cap": 0.5}},
        {"training": {"learning_rate": 0.1}},
        {"teacher": {"replicas": 3, "chunk_rows": 7, "max_batched_tokens": 64, "placement": {"cpus": 2.0}}},
        {"teacher": {"options": {"delay_s_per_token": 0.1, "row_error_every": 2}}},
        {"name": "renamed"},
    ],
)
def test_settings_that_change_no_byte_change_no_identity(tmp_path, change):
    first = prepare(recipe_of(tmp_path))
    assert prepare(recipe_of(tmp_path, **change)).fingerprint == first.fingerprint


def test_the_same_recipe_has_the_same_fingerprint_anywhere(tmp_path):
    first = prepare(recipe_of(tmp_path))
    (tmp_path / "corpus.jsonl").rename(tmp_path / "moved.jsonl")
    moved = recipe_of(tmp_path, storage="memory://prepare-test", corpus={"source": str(tmp_path / "moved.jsonl")})
    second = prepare(moved)
    assert (second.fingerprint, second.unit_ids, second.tokens) == (first.fingerprint, first.unit_ids, first.tokens)


def test_a_changed_corpus_is_refused(tmp_path):
    prepare(recipe_of(tmp_path))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("document 7", "document seven"))
    with pytest.raises(IdentityError, match=r"corpus\.digest: got"):
        prepare(recipe_of(tmp_path))


def test_a_longer_corpus_is_refused_only_where_the_whole_corpus_was_read(tmp_path):
    prepare(recipe_of(tmp_path))
    capped = {"corpus": {"max_tokens": 300}, "storage": str(tmp_path / "capped")}
    prepare(recipe_of(tmp_path, **capped))
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write('{"id": "one more", "text": "more text"}\n')
    prepare(recipe_of(tmp_path, **capped))
    with pytest.raises(IdentityError, match=r"corpus\.digest"):
        prepare(recipe_of(tmp_path))


def test_documents_without_a_label_are_reported(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"id": "a", "text": "x"}\n{"id": "b", "text": "long enough"}\n')
    recipe = recipe_of(tmp_path, corpus={"held_out": 0.0})
    assert prepare(recipe).skipped == ("a",)
    assert prepare(recipe).skipped == ("a",)


def test_a_corpus_without_any_label_is_refused(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"id": "a", "text": "x"}\n')
    with pytest.raises(CorpusError, match="expected at least one sequence of two tokens"):
        prepare(recipe_of(tmp_path, corpus={"held_out": 0.0}))
    assert not (tmp_path / "run" / "caches" / "dummy" / "cache.json").exists()


def test_more_entries_than_the_vocabulary_has_are_refused(tmp_path, model):
    with pytest.raises(RecipeError) as caught:
        prepare(recipe_of(tmp_path, capture={"k": 512}))
    assert str(caught.value) == "recipe test capture.k: expected 1..V-1 (V=512), got 512"
    with pytest.raises(RecipeError, match=r"\(V=300\), got 300"):
        prepare(recipe_of(tmp_path, capture={"k": 300}, teacher={"model": str(model), "engine": "transformers"}))


@pytest.mark.parametrize("layer", [5, -2])
def test_a_hidden_layer_that_the_teacher_lacks_is_refused(tmp_path, layer):
    with pytest.raises(RecipeError, match=rf"capture\.hidden_layers: expected 0\.\.4 or -1 .*, got {layer}"):
        prepare(recipe_of(tmp_path, capture={"hidden_layers": [0, layer]}))


def test_sequences_longer_than_the_teacher_reads_are_refused(tmp_path, model):
    with pytest.raises(RecipeError, match=r"corpus\.sequence_length: expected at most 64 .*, got 65"):
        prepare(recipe_of(tmp_path, corpus={"sequence_length": 65}, teacher={"model": str(model)}))


def test_a_missing_teacher_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        prepare(recipe_of(tmp_path, teacher={"model": "/nowhere", "engine": "vllm"}))
    assert not (tmp_path / "run").exists()


def test_the_model_is_in_the_identity_by_its_digest(tmp_path, model):
    recipe = recipe_of(tmp_path, teacher={"model": str(model)})
    prepared = prepare(recipe)
    assert read_identity(prepared.store).fields["teacher"]["model"] == prepared.model.digest
    model.rename(tmp_path / "elsewhere")
    prepare(recipe_of(tmp_path, teacher={"model": str(tmp_path / "elsewhere")}))
    save_file({"w": np.ones(4, np.float32)}, tmp_path / "elsewhere" / "model.safetensors")
    with pytest.raises(IdentityError, match=r"teacher\.model: got"):
        prepare(recipe_of(tmp_path, teacher={"model": str(tmp_path / "elsewhere")}))


def test_a_run_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(StorageError) as caught:
        prepare(recipe_of(tmp_path))
    assert "\n" not in str(caught.value)


def check(recipe):
    check_cache_identity(recipe, recipe.teachers[0])


def test_readers_check_a_cache_without_its_corpus(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path)
    with pytest.raises(StorageError, match="expected a cache"):
        check(recipe)
    prepare(recipe)
    (tmp_path / "corpus.jsonl").rename(tmp_path / "gone.jsonl")
    monkeypatch.setattr("pipeline.corpus.prepare.read_documents", lambda *_: pytest.fail("the corpus is read"))
    check(recipe)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"capture": {"k": 9}}, "capture.k: got 9, expected 8"),
        ({"corpus": {"sequence_length": 16}}, "corpus.sequence_length: got 16, expected 32"),
        ({"teacher": {"options": {"seed": 3}}}, "teacher.options.seed: got 3, expected nothing"),
    ],
)
def test_readers_refuse_another_cache(tmp_path, change, field):
    prepare(recipe_of(tmp_path))
    with pytest.raises(IdentityError, match=re.escape(field)):
        check(recipe_of(tmp_path, **change))


def test_readers_compare_a_model_by_its_digest_or_by_its_name_if_it_is_not_on_this_machine(tmp_path, model):
    recipe = recipe_of(tmp_path, teacher={"model": str(model)})
    prepare(recipe)
    model.rename(tmp_path / "elsewhere")
    check(recipe)
    check(recipe_of(tmp_path, teacher={"model": str(tmp_path / "elsewhere")}))
    with pytest.raises(IdentityError, match=r'teacher\.model: got "/another/place"'):
        check(recipe_of(tmp_path, teacher={"model": "/another/place"}))
    save_file({"w": np.ones(4, np.float32)}, tmp_path / "elsewhere" / "model.safetensors")
    with pytest.raises(IdentityError, match=r"teacher\.model: got"):
        check(recipe_of(tmp_path, teacher={"model": str(tmp_path / "elsewhere")}))


def test_readers_download_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.models.shipped._download", lambda *_: pytest.fail("downloaded"))
    prepare(recipe_of(tmp_path))
    with pytest.raises(IdentityError, match=r"teacher\.model"):
        check(recipe_of(tmp_path, teacher={"model": "smollm2-135m-instruct", "engine": "vllm"}))
