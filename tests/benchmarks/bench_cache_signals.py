"""Where the cache's benchmark has its signals from: a real teacher's states, reduced as capture reduces them."""

import argparse
import random
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.engines import open_engine
from actors.engines.word_starts import word_starts
from actors.sampling import row_uniforms
from actors.signals import reduce_rows
from pipeline.cache.codecs.hidden import to_float32
from pipeline.cache.schema import ShardSpec
from pipeline.config import CorpusSpec, TeacherSpec
from pipeline.contracts import CaptureSpec, LmHead, ScoredSequence, Signals, TokenSequence
from pipeline.corpus import read_documents
from pipeline.model_store import resolve_model
from pipeline.sequences import CutSettings, cut
from pipeline.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Teacher:
    """What the benchmark asks a teacher for once: states, and the head that makes logits of them."""

    spec: ShardSpec
    """Of the engine's own capture; each mode replaces its capture spec."""
    head: LmHead
    boundary_V: NDArray[np.bool_]
    sequences: list[TokenSequence]
    signals: list[Signals]


def ask(arguments: argparse.Namespace) -> Teacher:
    """States, head and word starts of the teacher over sequences from all over the text."""
    model = resolve_model(arguments.model)
    teacher = TeacherSpec(name="bench", model=arguments.model, engine="transformers", max_batched_tokens=1024)
    layers = int(model.text_config["num_hidden_layers"])
    capture = CaptureSpec(k=1, hidden_layers=(layers // 2,))
    sequences = _sequences(arguments, load_tokenizer(model.path))
    engine = open_engine(teacher, model, capture)
    description, head = engine.describe(), engine.lm_head()
    if head is None:
        raise SystemExit(f"error: teacher {arguments.model}: its LM head is more than a matrix; use another model")
    signals = []
    for number, sequence in enumerate(sequences):
        signals += engine.score([sequence])
        print(f"scored {number + 1} of {len(sequences)} sequences", file=sys.stderr, flush=True)
    engine.close()
    boundary_V = word_starts(model.path, description.vocabulary)
    return Teacher(ShardSpec.of(capture, description), head, boundary_V, sequences, signals)


def _sequences(arguments: argparse.Namespace, tokenizer: Any) -> list[TokenSequence]:
    """Whole documents in a seeded order, at most four windows each, until there are enough tokens."""
    corpus = CorpusSpec(source=arguments.text, sequence_length=arguments.sequence_length)
    documents = list(read_documents(corpus))
    random.Random(0).shuffle(documents)
    found: list[TokenSequence] = []
    for document in documents:
        if sum(len(sequence.input_ids_N) - 1 for sequence in found) >= arguments.tokens:
            break
        found += cut(document, tokenizer, "train", CutSettings(corpus, audit=1.0, seed=0))[:4]
    return found


def reduced(teacher: Teacher, number: int, capture: CaptureSpec) -> ScoredSequence:
    """The signals of one sequence under a capture spec, from its exact states."""
    sequence, exact_TD = teacher.sequences[number], teacher.signals[number].exact_hidden_TD
    assert exact_TD is not None
    signals = reduce_rows(
        logits_of(teacher.head, exact_TD),
        torch.from_numpy(sequence.input_ids_N[1:].astype(np.int64)),
        capture,
        torch.from_numpy(row_uniforms(capture, sequence.sequence_id, len(exact_TD))),
        torch.from_numpy(teacher.boundary_V),
    )
    shape = signals.tail_shape_R3
    boundary = signals.boundary_logmass_R
    return ScoredSequence(
        replace(sequence, audited=False),
        Signals(
            entry_id_TK=signals.entry_id_RK.numpy(),
            entry_logweight_TK=signals.entry_logweight_RK.numpy(),
            tail_logmass_T=signals.tail_logmass_R.numpy(),
            label_logprob_T=signals.label_logprob_R.numpy(),
            entropy_T=signals.entropy_R.numpy(),
            log_partition_TC=signals.log_partition_RC.numpy(),
            tail_shape_T3=None if shape is None else shape.numpy(),
            boundary_logmass_T=None if boundary is None else boundary.numpy(),
        ),
    )


def logits_of(head: LmHead, state_TD: NDArray[np.uint16]) -> torch.Tensor:
    logits = torch.from_numpy(to_float32(state_TD)) @ torch.from_numpy(to_float32(head.weight_VD)).T
    if head.bias_V is not None:
        logits += torch.from_numpy(head.bias_V)
    logits *= head.scale
    return logits if head.soft_cap is None else torch.tanh(logits / head.soft_cap) * head.soft_cap
