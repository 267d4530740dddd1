"""Tokens, sequences and units of a corpus under a teacher's tokenizer, before capture.

Generated answers are counted at their maximum length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.config import Recipe, TeacherSpec
from pipeline.contracts import Document, Split, TokenSequence
from pipeline.corpus.answers import append_answer, check_prompt
from pipeline.corpus.documents import read_documents
from pipeline.corpus.prepare import check_not_empty
from pipeline.corpus.splits import Splitter
from pipeline.corpus.windows import CutSettings, Cutter, units_of
from pipeline.models.folders import ModelFolder
from pipeline.models.tokenizers import ByteTokenizer, Tokenizer, Tokens, load_tokenizer

PLACEHOLDER = "\ue000"
"""Placeholder for one token of an answer that is not generated yet: a private-use character."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Size of a corpus under one tokenizer."""

    units: int
    sequences: int
    tokens: dict[Split, int]
    audited_tokens: int

    @property
    def total_tokens(self) -> int:
        """Tokens of both splits."""
        return sum(self.tokens.values())


def count(recipe: Recipe, teacher: TeacherSpec, model: ModelFolder | None) -> Counts:
    """Units, sequences and tokens of the teacher's cache; upper bounds where teachers generate answers."""
    units = rows = audited = 0
    tokens: dict[Split, int] = {"train": 0, "held_out": 0}
    for unit in units_of(planned_sequences(recipe, teacher, model), recipe.capture.unit_sequences):
        units, rows = units + 1, rows + len(unit.sequences)
        lengths = [len(sequence.input_ids_N) for sequence in unit.sequences]
        tokens[unit.split] += sum(lengths)
        audited += sum(n for n, sequence in zip(lengths, unit.sequences, strict=True) if sequence.audited)
    return Counts(units, rows, tokens, audited)


def planned_sequences(recipe: Recipe, teacher: TeacherSpec, model: ModelFolder | None) -> Iterator[TokenSequence]:
    """The sequences that the teacher will score; answers are `sampling.max_tokens` tokens of id 0.

    Raises CorpusError at the end where no sequence has a label.
    """
    tokenizer: Tokenizer = ByteTokenizer() if model is None else load_tokenizer(model.path)
    authors = recipe.authors(teacher)
    documents = read_documents(recipe.corpus)
    if authors:
        tokenizer, documents = _PlaceholderTokenizer(tokenizer), _longest_answers(documents, authors)
    side = Splitter((d.split_id for d in read_documents(recipe.corpus)), recipe.corpus.held_out, recipe.seed)
    cutter = Cutter(tokenizer, CutSettings(recipe.corpus, recipe.capture.audit, recipe.seed), side)
    yield from cutter.sequences(documents)
    check_not_empty(recipe, cutter)


def _longest_answers(prompts: Iterator[Document], authors: Sequence[TeacherSpec]) -> Iterator[Document]:
    for prompt in prompts:
        for author in authors:
            check_prompt(prompt, author.name)
            length = 0 if author.sampling is None else author.sampling.max_tokens
            yield append_answer(prompt, PLACEHOLDER * length, author.name, finished=True)


class _PlaceholderTokenizer:
    """The teacher's tokenizer, with one token for every PLACEHOLDER."""

    def __init__(self, own: Tokenizer) -> None:
        self._own = own
        self.size, self.token_text, self.decode, self.render = own.size, own.token_text, own.decode, own.render

    def encode(self, text: str, *, rendered: bool = False) -> Tokens:
        """Tokens of the prompt, of the placeholders, and of what the chat template appends."""
        before, after = text.partition(PLACEHOLDER)[0], text.rpartition(PLACEHOLDER)[2]
        length, start = text.count(PLACEHOLDER), len(before.encode())
        if length == 0:
            return self._own.encode(text, rendered=rendered)
        head, tail = self._own.encode(before, rendered=rendered), self._own.encode(after, rendered=True)
        width = len(PLACEHOLDER.encode())
        end_N = start + width * np.arange(1, length + 1, dtype=np.int32)
        return Tokens(
            np.concatenate([head.input_ids_N, np.zeros(length, np.int32), tail.input_ids_N]),
            np.concatenate([head.byte_end_N, end_N, start + width * length + tail.byte_end_N]).astype(np.int32),
        )
