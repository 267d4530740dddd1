"""Documents -> sequences -> units. All of it a pure function of the corpus, the tokenizer and the settings.

A document is cut into windows that share one token with the next, so that every token but the first is a label exactly
once. The cut never depends on other documents, except for the caps on tokens, which end the corpus.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.storage.layout import format_unit_id
from pipeline.config import CorpusSpec
from pipeline.contracts import Document, MaskArray, Split, TokenSequence, Unit
from pipeline.corpus.splits import Splitter
from pipeline.errors import CorpusError
from pipeline.identity import uniform
from pipeline.models.tokenizers import RenderedChat, Tokenizer, Tokens


@dataclass(frozen=True, slots=True)
class CutSettings:
    """How documents become sequences, besides the tokenizer."""

    corpus: CorpusSpec
    audit: float
    """Share of the training sequences that are audited; held-out sequences always are."""
    seed: int

    @property
    def max_tokens(self) -> dict[Split, float]:
        """Tokens of each split. The held-out side is capped in proportion where only the training side is."""
        spec = self.corpus
        train = float(spec.max_tokens or math.inf)
        if spec.held_out == 1.0:
            return {"train": 0.0, "held_out": float(spec.max_held_out_tokens or train)}
        if spec.held_out == 0.0:
            return {"train": train, "held_out": 0.0}
        in_proportion = max(2.0, train * spec.held_out / (1.0 - spec.held_out))
        return {"train": train, "held_out": float(spec.max_held_out_tokens or in_proportion)}


def cut_windows(document: Document, tokenizer: Tokenizer, split: Split, settings: CutSettings) -> list[TokenSequence]:
    """The windows of one document, in order; none where it has no label (a single token, or no assistant's token).

    Raises CorpusError where the document has no tokens, or is a chat that the tokenizer's template refuses.
    """
    tokens, counts_N = _tokenise(document, tokenizer, settings.corpus.loss_on)
    if len(tokens.input_ids_N) == 0:
        raise CorpusError(f"corpus document {document.id!r}: has no tokens")
    step = settings.corpus.sequence_length - 1
    windows = []
    for number, start in enumerate(range(0, len(tokens.input_ids_N) - 1, step)):
        mask_N = counts_N[start : start + step + 1].copy()
        mask_N[0] = 0
        if mask_N.any():
            windows.append(_window(document, split, settings, tokens, number, slice(start, start + step + 1), mask_N))
    return windows


def sequence_id(document_id: str, window: int) -> str:
    """A name that may become a path: readable, and unique through a hash of the document's id."""
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", document_id)[-48:].strip("-") or "document"
    return f"{readable}-{hashlib.sha256(document_id.encode()).hexdigest()[:16]}-{window:05d}"


@dataclass
class Cutter:
    """Cuts a whole corpus, up to the caps. What was read and passed over stands in it when the sequences have ended."""

    tokenizer: Tokenizer
    settings: CutSettings
    side: Splitter
    documents_read: int = 0
    skipped: list[str] = field(default_factory=list)
    """Ids of documents that hold no label."""
    tokens: dict[Split, int] = field(default_factory=lambda: {"train": 0, "held_out": 0})

    def sequences(self, documents: Iterable[Document]) -> Iterator[TokenSequence]:
        """All sequences, in the corpus' order. Stops reading when both splits are full."""
        for document in documents:
            self.documents_read += 1
            yield from self._take(document)
            if all(self._room(split) < 2 for split in ("train", "held_out")):
                return

    def _take(self, document: Document) -> Iterator[TokenSequence]:
        split = self.side(document.split_id)
        if self._room(split) < 2:
            return
        windows = cut_windows(document, self.tokenizer, split, self.settings)
        if not windows:
            self.skipped.append(document.id)
        for window in windows:
            if self._room(split) >= 2:
                fitting = _shortened(window, self._room(split))
                self.tokens[split] += len(fitting.input_ids_N)
                yield fitting

    def _room(self, split: Split) -> float:
        return self.settings.max_tokens[split] - self.tokens[split]


def units_of(sequences: Iterable[TokenSequence], unit_sequences: int) -> Iterator[Unit]:
    """Sequences in groups of `unit_sequences`, each split for itself; the last unit of a split may be smaller."""
    waiting: dict[Split, list[TokenSequence]] = {"train": [], "held_out": []}
    numbers: dict[Split, int] = {"train": 0, "held_out": 0}

    def close(split: Split) -> Unit:
        unit = Unit(format_unit_id(split, numbers[split]), split, tuple(waiting[split]))
        waiting[split], numbers[split] = [], numbers[split] + 1
        return unit

    for sequence in sequences:
        waiting[sequence.split].append(sequence)
        if len(waiting[sequence.split]) == unit_sequences:
            yield close(sequence.split)
    yield from (close(split) for split in ("train", "held_out") if waiting[split])


def _window(
    document: Document,
    split: Split,
    settings: CutSettings,
    tokens: Tokens,
    number: int,
    window: slice,
    mask_N: MaskArray,
) -> TokenSequence:
    name = sequence_id(document.id, number)
    return TokenSequence(
        sequence_id=name,
        document_id=document.id,
        domain=document.domain,
        split=split,
        input_ids_N=tokens.input_ids_N[window],
        loss_mask_N=mask_N,
        byte_end_N=tokens.byte_end_N[window],
        byte_start=int(tokens.byte_end_N[window.start - 1]) if window.start else 0,
        audited=split == "held_out" or uniform("audit", settings.seed, name) < settings.audit,
    )


def _tokenise(document: Document, tokenizer: Tokenizer, loss_on: str) -> tuple[Tokens, MaskArray]:
    """A document's tokens, and which of them count as labels."""
    if document.messages is None:
        text = document.text or ""
        tokens = tokenizer.encode(text)
        if document.prompt:
            return tokens, _ending_within(tokens.byte_end_N, text, [(document.prompt, len(text))])
        return tokens, np.ones(len(tokens.input_ids_N), np.uint8)
    by_assistant = loss_on == "assistant" or document.prompt > 0
    try:
        chat = tokenizer.render(document.messages, spans=by_assistant)
    except CorpusError as error:
        raise CorpusError(f"corpus document {document.id!r}: {error}") from error
    tokens = tokenizer.encode(chat.text, rendered=True)
    if not by_assistant:
        return tokens, np.ones(len(tokens.input_ids_N), np.uint8)
    return tokens, _ending_within(tokens.byte_end_N, chat.text, _labelled(document, chat))


def _labelled(document: Document, chat: RenderedChat) -> Iterable[tuple[int, int]]:
    """The spans of a chat whose tokens are labels: what the assistant wrote behind the prompt, if there is one."""
    messages = document.messages or ()
    asked = sum(message.role == "assistant" for message in messages[: document.prompt])
    spans = list(chat.assistant[asked:])
    if spans and not document.finished:
        start, end = spans[-1]
        content = messages[-1].content.strip()
        at = chat.text.find(content, start, end)
        spans[-1] = (start, at + len(content) if at >= 0 else end)
    return spans


def _ending_within(byte_end_N: NDArray[np.int32], text: str, spans: Iterable[tuple[int, int]]) -> MaskArray:
    """1 for each token that ends inside one of the spans of characters."""
    inside_N = np.zeros(len(byte_end_N), np.uint8)
    for start, end in spans:
        start_byte, end_byte = len(text[:start].encode()), len(text[:end].encode())
        inside_N |= ((byte_end_N > start_byte) & (byte_end_N <= end_byte)).astype(np.uint8)
    return inside_N


def _shortened(window: TokenSequence, room: float) -> TokenSequence:
    """The window's first `room` tokens."""
    if len(window.input_ids_N) <= room:
        return window
    n = int(room)
    return replace(
        window,
        input_ids_N=window.input_ids_N[:n],
        loss_mask_N=window.loss_mask_N[:n],
        byte_end_N=window.byte_end_N[:n],
    )
