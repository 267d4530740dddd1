"""What the evidence's students are taught from: a real text, asked once, kept in every target mode."""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from bench_cache_signals import logits_of, reduced

from actors.engines import open_engine
from pipeline.bfloat16 import to_float32
from pipeline.cache.format.schema import ShardSpec
from pipeline.config import CorpusSpec, TeacherSpec
from pipeline.contracts import CaptureSpec, Document, Engine, LmHead, ScoredSequence, TokenSequence
from pipeline.corpus.documents import read_documents
from pipeline.corpus.windows import CutSettings, cut_windows
from pipeline.models.folders import resolve_model
from pipeline.models.tokenizers import load_tokenizer

Lesson: TypeAlias = ScoredSequence
"""A sequence with its signals; its one hidden layer is the state that the LM head reads."""
WINDOWS = 2
"""Of a document, at most: many documents teach more than long ones."""


@dataclass(frozen=True)
class Lessons:
    """What a teacher said about one text."""

    shard: ShardSpec
    head: LmHead
    train: dict[CaptureSpec, list[Lesson]]
    """The same sequences, in the same order, under each capture spec."""
    held_out: list[Lesson]


def ask(arguments: argparse.Namespace, captures: Sequence[CaptureSpec]) -> Lessons:
    """Score documents in a seeded order: held-out ones first, then as many as training takes."""
    model = resolve_model(arguments.model)
    capture = CaptureSpec(k=1, hidden_layers=(-1,))
    teacher = TeacherSpec(name="teacher", model=arguments.model, engine="transformers", dtype="float32")
    engine = open_engine(teacher, model, capture)
    head = engine.lm_head()
    if head is None:
        raise SystemExit(f"error: teacher {arguments.model}: its LM head is more than a matrix; use another model")
    corpus = CorpusSpec(source=arguments.text, sequence_length=arguments.sequence_length)
    documents = list(read_documents(corpus))
    random.Random(0).shuffle(documents)
    windows = _windows(documents, load_tokenizer(model.path), corpus)
    held_out = [row for row, _ in _scored(engine, head, windows, arguments.held_out_tokens, ())]
    train: dict[CaptureSpec, list[Lesson]] = {capture: [] for capture in captures}
    for _, kept in _scored(engine, head, windows, arguments.tokens, captures):
        for capture, row in zip(captures, kept, strict=True):
            train[capture].append(row)
    description = engine.describe()
    engine.close()
    return Lessons(ShardSpec.of(capture, description), head, train, held_out)


def _windows(documents: Sequence[Document], tokenizer: object, corpus: CorpusSpec) -> Iterator[list[TokenSequence]]:
    """Whole windows, document by document, so that no document lends to both splits."""
    for document in documents:
        cuts = cut_windows(document, tokenizer, "train", CutSettings(corpus, audit=1.0, seed=0))  # type: ignore[arg-type]
        whole = [sequence for sequence in cuts if len(sequence.input_ids_N) == corpus.sequence_length]
        if whole:
            yield whole[:WINDOWS]


def _scored(
    engine: Engine, head: LmHead, windows: Iterator[list[TokenSequence]], tokens: int, captures: Sequence[CaptureSpec]
) -> Iterator[tuple[Lesson, list[Lesson]]]:
    """Sequences until there are enough tokens, and each of them under every capture spec."""
    weight_DV = torch.from_numpy(to_float32(head.weight_VD)).T
    left = tokens
    for document in windows:
        for sequence in document:
            signals = engine.score([sequence])[0]
            logits_TV = logits_of(head, weight_DV, signals)
            own = (reduced(sequence, logits_TV, torch.empty(0), capture) for capture in captures)
            states = signals.hidden_TLD
            yield (
                ScoredSequence(sequence, signals),
                [replace(row, signals=replace(row.signals, hidden_TLD=states)) for row in own],
            )
            left -= len(sequence.input_ids_N)
        print(f"{max(left, 0)} tokens left to score", file=sys.stderr, flush=True)
        if left <= 0:
            return
