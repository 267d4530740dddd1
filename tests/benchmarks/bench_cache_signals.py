"""Signals for the cache's benchmark: a real teacher's hidden states, reduced as capture reduces them."""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from actors.engines import open_engine
from actors.engines.packing import pack_rows, unpack_rows
from actors.engines.word_starts import word_starts
from actors.signals.reduce import reduce_rows
from actors.signals.sampling import row_uniforms
from pipeline.bfloat16 import to_float32
from pipeline.cache.format.schema import ShardSpec
from pipeline.config import CorpusSpec, TeacherSpec
from pipeline.contracts import CaptureSpec, LmHead, ScoredSequence, Signals, TokenSequence
from pipeline.corpus.documents import read_documents
from pipeline.corpus.windows import CutSettings, cut_windows
from pipeline.models.folders import resolve_model
from pipeline.models.tokenizers import load_tokenizer


@dataclass(frozen=True)
class Teacher:
    """Hidden states and signals of one teacher on one text."""

    spec: ShardSpec
    """Spec of `states`; every mode replaces its capture spec."""
    states: list[ScoredSequence]
    """With the middle layer's hidden states."""
    signals: dict[CaptureSpec, list[ScoredSequence]]
    """The same sequences under each capture spec."""


def score_text(arguments: argparse.Namespace, captures: Sequence[CaptureSpec]) -> Teacher:
    """Score sequences of shuffled documents; reduce their exact states under every capture spec."""
    model = resolve_model(arguments.model)
    teacher = TeacherSpec(name="bench", model=arguments.model, engine="transformers", max_batched_tokens=1024)
    capture = CaptureSpec(k=1, hidden_layers=(int(model.text_config["num_hidden_layers"]) // 2,))
    engine = open_engine(teacher, model, capture)
    description, lm_head = engine.describe(), engine.lm_head()
    if lm_head is None:
        raise SystemExit(f"error: teacher {arguments.model}: its LM head is more than a matrix; use another model")
    starts_V = torch.from_numpy(word_starts(model.path, description.vocabulary))
    weight_DV = torch.from_numpy(to_float32(lm_head.weight_VD)).T
    scored = Teacher(ShardSpec.of(capture, description), [], {capture: [] for capture in captures})
    for sequence in _sequences(arguments, load_tokenizer(model.path)):
        signals = engine.score([sequence])[0]
        scored.states.append(ScoredSequence(replace(sequence, audited=False), replace(signals, exact_hidden_TD=None)))
        logits_TV = logits_of(lm_head, weight_DV, signals)
        for capture in captures:
            scored.signals[capture].append(reduced(sequence, logits_TV, starts_V, capture))
        print(f"scored {len(scored.states)} sequences", file=sys.stderr, flush=True)
    engine.close()
    return scored


def _sequences(arguments: argparse.Namespace, tokenizer: Any) -> list[TokenSequence]:
    """Cut documents in a seeded order, at most four windows each, until there are enough tokens."""
    corpus = CorpusSpec(source=arguments.text, sequence_length=arguments.sequence_length)
    documents = list(read_documents(corpus))
    random.Random(0).shuffle(documents)
    sequences: list[TokenSequence] = []
    for document in documents:
        if sum(len(sequence.input_ids_N) - 1 for sequence in sequences) >= arguments.tokens:
            break
        sequences += cut_windows(document, tokenizer, "train", CutSettings(corpus, audit=1.0, seed=0))[:4]
    return sequences


def logits_of(head: LmHead, weight_DV: torch.Tensor, signals: Signals) -> torch.Tensor:
    """Return the [T, V] float32 logits of the exact states."""
    assert signals.exact_hidden_TD is not None
    logits = torch.from_numpy(to_float32(signals.exact_hidden_TD)) @ weight_DV
    if head.bias_V is not None:
        logits += torch.from_numpy(head.bias_V)
    logits *= head.scale
    return logits if head.soft_cap is None else torch.tanh(logits / head.soft_cap) * head.soft_cap


def reduced(
    sequence: TokenSequence, logits_TV: torch.Tensor, starts_V: torch.Tensor, capture: CaptureSpec
) -> ScoredSequence:
    """Reduce the logits of one sequence to its signals under a capture spec."""
    signals = reduce_rows(
        logits_TV,
        torch.from_numpy(sequence.input_ids_N[1:].astype(np.int64)),
        capture,
        torch.from_numpy(row_uniforms(capture, sequence.sequence_id, len(logits_TV))),
        starts_V if capture.boundary else None,
    )
    plain = replace(sequence, audited=False)
    return ScoredSequence(plain, unpack_rows(pack_rows(signals, [], None).numpy(), capture, 0, plain))
