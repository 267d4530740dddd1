"""Preparation of a cache before its teacher starts: model, identity, tokenizer files and units.

A second preparation of the same cache reads and hashes the documents again, but does not tokenise them.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.cache.description import check_identity, read_identity, write_cache_identity
from pipeline.cache.storage.layout import CACHE_JSON, TOKENIZER, UNIT_INDEX
from pipeline.cache.storage.store import Store
from pipeline.cache.storage.unit_ids import UnitIds
from pipeline.cache.unit_list import write_units
from pipeline.config import Recipe, TeacherSpec
from pipeline.contracts import Document, Split
from pipeline.corpus.answers import Answerer
from pipeline.corpus.documents import corpus_digest, read_documents
from pipeline.corpus.splits import Splitter
from pipeline.corpus.windows import CutSettings, Cutter, units_of
from pipeline.errors import CorpusError, IdentityError, RecipeError, UsageError
from pipeline.identity import fingerprint, sha256_bytes
from pipeline.models.dtype import resolve_dtype
from pipeline.models.folders import ModelFolder, find_local_model, resolve_model, tokenizer_files
from pipeline.models.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from pipeline.run.progress import counted

FORMAT = "stillhouse-cache/1"
_DUMMY_VOCABULARY, _DUMMY_LAYERS = 512, 4
_DUMMY_IDENTITY = ("vocabulary", "width", "layers", "seed")
"""Options of the dummy engine that change bytes of the cache; the others are delays and faults."""


@dataclass(frozen=True, slots=True)
class PreparedCache:
    """A cache that is ready for its capture."""

    store: Store
    fingerprint: str
    unit_ids: UnitIds
    """All units, those of `train` first."""
    tokens: int
    """Tokens of all sequences of both splits."""
    model: ModelFolder | None
    """None for a dummy teacher without a model."""
    skipped: tuple[str, ...] = ()
    """Ids of documents without labels, among those that were read."""


def prepare_cache(recipe: Recipe, teacher: TeacherSpec, answer: Answerer | None = None) -> PreparedCache:
    """Create the teacher's cache in the recipe's storage, or check an existing one against the recipe.

    `answer` generates the answers that the teacher scores, if it does. The identity of such a cache contains the digest
    of the prompts, and the models and sampling of their authors.

    Raises RecipeError (a setting that the model does not support), CorpusError, ModelError, StorageError, UsageError
    (answers are needed but `answer` is None), and IdentityError with the fields in which an existing cache differs.
    """
    model, teacher = resolve_teacher_model(teacher), resolve_dtype(teacher, recipe)
    check_capture(recipe, teacher, model)
    store = Store.open(recipe.cache_uri(teacher.name))
    fields = _identity(recipe, teacher, model)
    if not store.exists(CACHE_JSON):
        documents = counted(_documents(recipe, teacher, answer), f"tokenising for {teacher.name}", "document")
        _write(recipe, store, model, fields, {"model": _model_name(teacher)}, documents)
    stored = read_identity(store)
    check_identity(store, _with_digest(fields, recipe, stored.notes))
    return PreparedCache(
        store=store,
        fingerprint=stored.fingerprint,
        unit_ids=UnitIds.read(store),
        tokens=sum(stored.notes["tokens"].values()),
        model=model,
        skipped=tuple(stored.notes["skipped"]),
    )


def check_cache_identity(recipe: Recipe, teacher: TeacherSpec) -> None:
    """Raise IdentityError, with the fields that differ, unless the cache was made for this recipe and teacher.

    For readers of a cache: neither reads the corpus nor downloads a model. A model that is not on this machine is
    compared by name and revision only. Raises StorageError (no cache), DamageError.
    """
    store = Store.open(recipe.cache_uri(teacher.name))
    stored, teacher = read_identity(store), resolve_dtype(teacher, recipe)
    dummy = _is_dummy(teacher)
    model = None if dummy else find_local_model(teacher.model, revision=teacher.revision)
    fields = _identity(recipe, teacher, model)
    try:
        fields["corpus"]["digest"] = stored.fields["corpus"]["digest"]
        if model is None and not dummy:
            fields["tokenizer"] = stored.fields["tokenizer"]
            same_name = _model_name(teacher) == stored.notes["model"]
            fields["teacher"]["model"] = stored.fields["teacher"]["model"] if same_name else _model_name(teacher)
    except (KeyError, TypeError) as error:
        raise IdentityError(
            f"cache {store.uri}: its identity has no field {error}: it was made by another release"
        ) from error
    check_identity(store, fields)


def check_capture(recipe: Recipe, teacher: TeacherSpec, model: ModelFolder | None) -> None:
    """Raise RecipeError where capture settings exceed the model's vocabulary, layers or positions."""
    sizes = {} if model is None else model.text_config
    vocabulary = int(teacher.options.get("vocabulary", sizes.get("vocab_size", _DUMMY_VOCABULARY)))
    layers = int(teacher.options.get("layers", sizes.get("num_hidden_layers", _DUMMY_LAYERS)))
    longest = None if model is None else model.positions
    capture, length = recipe.capture, recipe.corpus.sequence_length
    if capture.k >= vocabulary:
        raise RecipeError(f"{recipe.location('capture.k')}: expected 1..V-1 (V={vocabulary}), got {capture.k}")
    for layer in capture.hidden_layers:
        if not -1 <= layer <= layers:
            raise RecipeError(
                f"{recipe.location('capture.hidden_layers')}: expected 0..{layers} or -1 "
                f"(teacher {teacher.name} has {layers} layers), got {layer}"
            )
    if longest is not None and length > longest:
        raise RecipeError(
            f"{recipe.location('corpus.sequence_length')}: expected at most {longest} "
            f"(positions of teacher {teacher.name}), got {length}"
        )


def resolve_teacher_model(teacher: TeacherSpec) -> ModelFolder | None:
    """Return the teacher's model, downloaded if necessary; None for the dummy model. Raises ModelError."""
    return None if _is_dummy(teacher) else resolve_model(teacher.model, revision=teacher.revision)


def _is_dummy(teacher: TeacherSpec) -> bool:
    return teacher.engine == "dummy" and teacher.model == "dummy"


def _model_name(teacher: TeacherSpec) -> str:
    return teacher.model if teacher.revision is None else f"{teacher.model}@{teacher.revision}"


def _identity(recipe: Recipe, teacher: TeacherSpec, model: ModelFolder | None) -> dict[str, Any]:
    """Return everything that changes a byte of the cache, except the corpus digest, which requires reading it."""
    corpus = recipe.corpus.model_dump(mode="json", exclude={"source"})
    # Authors by model name: they are teachers of this recipe, whose own caches contain their models' digests.
    authors = [
        {**teacher_identity(author, None), "name": author.name, "model": _model_name(author)}
        for author in recipe.authors(teacher)
    ]
    return {
        **({"answers": authors} if authors else {}),
        "format": FORMAT,
        "corpus": {**corpus, "split_seed": recipe.seed},
        "tokenizer": ByteTokenizer().digest if model is None else model.tokenizer_digest,
        "teacher": teacher_identity(teacher, model),
        "capture": asdict(recipe.capture.spec(recipe.seed)),
        "audit": recipe.capture.audit,
        "unit_sequences": recipe.capture.unit_sequences,
    }


def teacher_identity(teacher: TeacherSpec, model: ModelFolder | None) -> dict[str, Any]:
    """Return the settings of a teacher that change its signals and answers."""
    return {
        "model": teacher.model if model is None else model.digest,
        "engine": teacher.engine,
        "dtype": teacher.dtype,
        "quantization": teacher.quantization,
        "sampling": teacher.sampling and teacher.sampling.model_dump(mode="json"),
        "options": {key: value for key, value in teacher.options.items() if key in _DUMMY_IDENTITY},
    }


def _documents(recipe: Recipe, teacher: TeacherSpec, answer: Answerer | None) -> Iterator[Document]:
    if not recipe.authors(teacher):
        return read_documents(recipe.corpus)
    if answer is None:
        raise UsageError(f"teacher {teacher.name}: expected answers to its prompts, got none; run: stillhouse capture")
    return answer(read_documents(recipe.corpus))


def _write(
    recipe: Recipe,
    store: Store,
    model: ModelFolder | None,
    fields: dict[str, Any],
    notes: dict[str, Any],
    documents: Iterator[Document],
) -> None:
    """Write units, tokenizer, and last `cache.json`, which marks the others as complete."""
    tokenizer: Tokenizer = ByteTokenizer() if model is None else load_tokenizer(model.path)
    settings = CutSettings(recipe.corpus, recipe.capture.audit, recipe.seed)
    splitter = Splitter((d.split_id for d in read_documents(recipe.corpus)), recipe.corpus.held_out, recipe.seed)
    cutter = Cutter(tokenizer, settings, splitter)
    write_units(store, units_of(cutter.sequences(documents), recipe.capture.unit_sequences))
    check_not_empty(recipe, cutter)
    files = ByteTokenizer().files() if model is None else tokenizer_files(model.path)
    for name, data in files.items():
        store.put(f"{TOKENIZER}/{name}", data)
    notes = {
        **notes,
        "documents_read": cutter.documents_read,
        "whole_corpus": next(documents, None) is None,
        "tokens": cutter.tokens,
        "skipped": cutter.skipped,
        "plan_sha256": sha256_bytes(store.read(UNIT_INDEX)),
    }
    write_cache_identity(store, _with_digest(fields, recipe, notes), {**notes, "digest": fingerprint(notes)})


def _with_digest(fields: dict[str, Any], recipe: Recipe, notes: Mapping[str, Any]) -> dict[str, Any]:
    """Add the digest of the documents that were read.

    If the whole corpus was read, the next document is included too, so that an appended one changes the digest.
    """
    count = notes["documents_read"] + (1 if notes["whole_corpus"] else 0)
    digest = corpus_digest(itertools.islice(read_documents(recipe.corpus), count))
    return {**fields, "corpus": {**fields["corpus"], "digest": digest}}


def check_not_empty(recipe: Recipe, cutter: Cutter) -> None:
    """Raise CorpusError if no sequence was cut for the training split, or for the held-out split if that is all."""
    split: Split = "train" if recipe.corpus.held_out < 1.0 else "held_out"
    if not cutter.tokens[split]:
        raise CorpusError(
            f"corpus {recipe.corpus.source}: expected at least one sequence of two tokens with a label on the "
            f"{split} side, got none in {cutter.documents_read} documents"
        )
