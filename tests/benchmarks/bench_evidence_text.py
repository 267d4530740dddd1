"""Training and held-out data of bench_evidence.py: a real text, scored once, reduced in every target mode."""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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

WINDOWS = 2
"""Most windows of a document, so that the text comes from many documents."""


@dataclass(frozen=True)
class ScoredText:
    """Signals of one teacher on one text; the one hidden layer is the state that the LM head reads."""

    shard: ShardSpec
    head: LmHead
    train: dict[CaptureSpec, list[ScoredSequence]]
    """The same sequences, in the same order, under each capture spec."""
    held_out: list[ScoredSequence]


def score_text(arguments: argparse.Namespace, captures: Sequence[CaptureSpec]) -> ScoredText:
    """Score documents in a seeded order: first the held-out tokens, then the training tokens."""
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
    train: dict[CaptureSpec, list[ScoredSequence]] = {capture: [] for capture in captures}
    for _, reduced_rows in _scored(engine, head, windows, arguments.tokens, captures):
        for capture, row in zip(captures, reduced_rows, strict=True):
            train[capture].append(row)
    description = engine.describe()
    engine.close()
    return ScoredText(ShardSpec.of(capture, description), head, train, held_out)


def _windows(documents: Sequence[Document], tokenizer: object, corpus: CorpusSpec) -> Iterator[list[TokenSequence]]:
    """Yield the full windows of each document, so that no document is in both splits."""
    for document in documents:
        cuts = cut_windows(document, tokenizer, "train", CutSettings(corpus, audit=1.0, seed=0))  # type: ignore[arg-type]
        full = [sequence for sequence in cuts if len(sequence.input_ids_N) == corpus.sequence_length]
        if full:
            yield full[:WINDOWS]


def _scored(
    engine: Engine, head: LmHead, windows: Iterator[list[TokenSequence]], tokens: int, captures: Sequence[CaptureSpec]
) -> Iterator[tuple[ScoredSequence, list[ScoredSequence]]]:
    """Yield scored sequences until there are enough tokens, each with its reductions under every capture spec."""
    weight_DV = torch.from_numpy(to_float32(head.weight_VD)).T
    remaining = tokens
    for document in windows:
        for sequence in document:
            signals = engine.score([sequence])[0]
            logits_TV = logits_of(head, weight_DV, signals)
            reductions = (reduced(sequence, logits_TV, torch.empty(0), capture) for capture in captures)
            states = signals.hidden_TLD
            yield (
                ScoredSequence(sequence, signals),
                [replace(row, signals=replace(row.signals, hidden_TLD=states)) for row in reductions],
            )
            remaining -= len(sequence.input_ids_N)
        print(f"{max(remaining, 0)} tokens left to score", file=sys.stderr, flush=True)
        if remaining <= 0:
            return
