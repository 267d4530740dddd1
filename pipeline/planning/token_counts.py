"""What a corpus comes to under a teacher's tokenizer, before anything is written. Answers count at their longest."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.config import Recipe, TeacherSpec
from pipeline.contracts import Document, Split, TokenSequence
from pipeline.corpus.answers import append_answer, check_prompt
from pipeline.corpus.documents import Splitter, read_documents
from pipeline.corpus.prepare import check_not_empty
from pipeline.corpus.windows import CutSettings, Cutter, units_of
from pipeline.models.folders import ModelFolder
from pipeline.models.tokenizers import ByteTokenizer, Tokenizer, Tokens, load_tokenizer

UNWRITTEN = "\ue000"
"""Stands for one token of an answer that is not written yet: a character that no text uses."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What the corpus comes to under one tokenizer."""

    units: int
    sequences: int
    tokens: dict[Split, int]
    audited_tokens: int

    @property
    def total_tokens(self) -> int:
        """Of both splits."""
        return sum(self.tokens.values())


def count(recipe: Recipe, teacher: TeacherSpec, model: ModelFolder | None) -> Counts:
    """Units, sequences and tokens of the teacher's cache: the most there can be, where teachers write."""
    units = rows = audited = 0
    tokens: dict[Split, int] = {"train": 0, "held_out": 0}
    for unit in units_of(planned_sequences(recipe, teacher, model), recipe.capture.unit_sequences):
        units, rows = units + 1, rows + len(unit.sequences)
        lengths = [len(sequence.input_ids_N) for sequence in unit.sequences]
        tokens[unit.split] += sum(lengths)
        audited += sum(n for n, sequence in zip(lengths, unit.sequences, strict=True) if sequence.audited)
    return Counts(units, rows, tokens, audited)


def planned_sequences(recipe: Recipe, teacher: TeacherSpec, model: ModelFolder | None) -> Iterator[TokenSequence]:
    """The sequences that the teacher will score; an answer is as many tokens as `sampling` allows, all of id 0.

    Raises CorpusError in the end, if there was nothing to learn from.
    """
    tokenizer: Tokenizer = ByteTokenizer() if model is None else load_tokenizer(model.path)
    authors = recipe.authors(teacher)
    documents = read_documents(recipe.corpus)
    if authors:
        tokenizer, documents = _BeforeWriting(tokenizer), _at_their_longest(documents, authors)
    side = Splitter((d.split_id for d in read_documents(recipe.corpus)), recipe.corpus.held_out, recipe.seed)
    cutter = Cutter(tokenizer, CutSettings(recipe.corpus, recipe.capture.audit, recipe.seed), side)
    yield from cutter.sequences(documents)
    check_not_empty(recipe, cutter)


def _at_their_longest(prompts: Iterator[Document], authors: Sequence[TeacherSpec]) -> Iterator[Document]:
    for prompt in prompts:
        for author in authors:
            check_prompt(prompt, author.name)
            length = 0 if author.sampling is None else author.sampling.max_tokens
            yield append_answer(prompt, UNWRITTEN * length, author.name, finished=True)


class _BeforeWriting:
    """The teacher's own tokenizer, but that every UNWRITTEN is one token."""

    def __init__(self, own: Tokenizer) -> None:
        self._own = own
        self.size, self.token_text, self.decode, self.render = own.size, own.token_text, own.decode, own.render

    def encode(self, text: str, *, rendered: bool = False) -> Tokens:
        """What stands before the answer, the answer, and what the chat's template puts behind it."""
        before, after = text.partition(UNWRITTEN)[0], text.rpartition(UNWRITTEN)[2]
        length, start = text.count(UNWRITTEN), len(before.encode())
        if length == 0:
            return self._own.encode(text, rendered=rendered)
        head, tail = self._own.encode(before, rendered=rendered), self._own.encode(after, rendered=True)
        width = len(UNWRITTEN.encode())
        end_N = start + width * np.arange(1, length + 1, dtype=np.int32)
        return Tokens(
            np.concatenate([head.input_ids_N, np.zeros(length, np.int32), tail.input_ids_N]),
            np.concatenate([head.byte_end_N, end_N, start + width * length + tail.byte_end_N]).astype(np.int32),
        )
