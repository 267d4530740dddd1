"""Documents to sequences to units: a pure function of corpus, tokenizer and settings.

Consecutive windows of a document overlap by one token, so that every token but the document's first is a label exactly
once. Windows do not depend on other documents, except that the token caps end a split.
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
    """How documents are cut into sequences."""

    corpus: CorpusSpec
    audit: float
    """Fraction of the training sequences that are audited; held-out sequences always are."""
    seed: int

    @property
    def max_tokens(self) -> dict[Split, float]:
        """Token cap of each split. Without one of its own, the held-out split is capped in proportion to `train`."""
        spec = self.corpus
        train = float(spec.max_tokens or math.inf)
        if spec.held_out == 1.0:
            return {"train": 0.0, "held_out": float(spec.max_held_out_tokens or train)}
        if spec.held_out == 0.0:
            return {"train": train, "held_out": 0.0}
        proportional = max(2.0, train * spec.held_out / (1.0 - spec.held_out))
        return {"train": train, "held_out": float(spec.max_held_out_tokens or proportional)}


def cut_windows(document: Document, tokenizer: Tokenizer, split: Split, settings: CutSettings) -> list[TokenSequence]:
    """Return the windows of a document that have labels; none for a single token or a chat without assistant tokens.

    Raises CorpusError if the document has no tokens or is a chat that the tokenizer's template rejects.
    """
    tokens, is_label_N = _tokenise(document, tokenizer, settings.corpus.loss_on)
    if len(tokens.input_ids_N) == 0:
        raise CorpusError(f"corpus document {document.id!r}: expected at least one token, got none")
    step = settings.corpus.sequence_length - 1
    windows = []
    for number, start in enumerate(range(0, len(tokens.input_ids_N) - 1, step)):
        window = slice(start, start + step + 1)
        mask_N = is_label_N[window].copy()
        mask_N[0] = 0
        if mask_N.any():
            name = sequence_id(document.id, number)
            sequence = TokenSequence(
                sequence_id=name,
                document_id=document.id,
                domain=document.domain,
                split=split,
                input_ids_N=tokens.input_ids_N[window],
                loss_mask_N=mask_N,
                byte_end_N=tokens.byte_end_N[window],
                byte_start=int(tokens.byte_end_N[start - 1]) if start else 0,
                audited=split == "held_out" or uniform("audit", settings.seed, name) < settings.audit,
            )
            windows.append(sequence)
    return windows


def sequence_id(document_id: str, window: int) -> str:
    """Return a name that is valid in paths: readable, and unique by a hash of the document's id."""
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", document_id)[-48:].strip("-") or "document"
    return f"{readable}-{hashlib.sha256(document_id.encode()).hexdigest()[:16]}-{window:05d}"


@dataclass
class Cutter:
    """Cuts a corpus into sequences up to the token caps, and counts documents and tokens meanwhile."""

    tokenizer: Tokenizer
    settings: CutSettings
    splitter: Splitter
    documents_read: int = 0
    skipped: list[str] = field(default_factory=list)
    """Ids of documents without labels."""
    tokens: dict[Split, int] = field(default_factory=lambda: {"train": 0, "held_out": 0})

    def sequences(self, documents: Iterable[Document]) -> Iterator[TokenSequence]:
        """Yield the sequences in the corpus' order. Stops reading documents when both splits are full."""
        for document in documents:
            self.documents_read += 1
            yield from self._windows(document)
            if all(self._tokens_left(split) < 2 for split in self.tokens):
                return

    def _windows(self, document: Document) -> Iterator[TokenSequence]:
        split = self.splitter(document.split_id)
        if self._tokens_left(split) < 2:
            return
        windows = cut_windows(document, self.tokenizer, split, self.settings)
        if not windows:
            self.skipped.append(document.id)
        for window in windows:
            if self._tokens_left(split) >= 2:
                sequence = _truncated(window, self._tokens_left(split))
                self.tokens[split] += len(sequence.input_ids_N)
                yield sequence

    def _tokens_left(self, split: Split) -> float:
        return self.settings.max_tokens[split] - self.tokens[split]


def units_of(sequences: Iterable[TokenSequence], unit_sequences: int) -> Iterator[Unit]:
    """Group the sequences of each split into units of `unit_sequences`; the last unit of a split may be smaller."""
    pending: dict[Split, list[TokenSequence]] = {"train": [], "held_out": []}
    numbers: dict[Split, int] = {"train": 0, "held_out": 0}

    def close(split: Split) -> Unit:
        unit = Unit(format_unit_id(split, numbers[split]), split, tuple(pending[split]))
        pending[split], numbers[split] = [], numbers[split] + 1
        return unit

    for sequence in sequences:
        pending[sequence.split].append(sequence)
        if len(pending[sequence.split]) == unit_sequences:
            yield close(sequence.split)
    yield from (close(split) for split in ("train", "held_out") if pending[split])


def _tokenise(document: Document, tokenizer: Tokenizer, loss_on: str) -> tuple[Tokens, MaskArray]:
    """Return a document's tokens, and a mask of those that are labels."""
    if document.messages is None:
        text = document.text or ""
        tokens = tokenizer.encode(text)
        if document.prompt:
            return tokens, _ends_within(tokens.byte_end_N, text, [(document.prompt, len(text))])
        return tokens, np.ones(len(tokens.input_ids_N), np.uint8)
    assistant_only = loss_on == "assistant" or document.prompt > 0
    try:
        chat = tokenizer.render(document.messages, spans=assistant_only)
    except CorpusError as error:
        raise CorpusError(f"corpus document {document.id!r}: {error}") from error
    tokens = tokenizer.encode(chat.text, rendered=True)
    if not assistant_only:
        return tokens, np.ones(len(tokens.input_ids_N), np.uint8)
    return tokens, _ends_within(tokens.byte_end_N, chat.text, _label_spans(document, chat))


def _label_spans(document: Document, chat: RenderedChat) -> Iterable[tuple[int, int]]:
    """Return the character spans of the assistant's messages after the prompt. One that was cut ends with its text."""
    messages = document.messages or ()
    in_prompt = sum(message.role == "assistant" for message in messages[: document.prompt])
    spans = list(chat.assistant_spans[in_prompt:])
    if spans and not document.finished:
        start, end = spans[-1]
        content = messages[-1].content.strip()
        at = chat.text.find(content, start, end)
        spans[-1] = (start, at + len(content) if at >= 0 else end)
    return spans


def _ends_within(byte_end_N: NDArray[np.int32], text: str, spans: Iterable[tuple[int, int]]) -> MaskArray:
    """Return 1 for each token that ends within one of the character spans."""
    inside_N = np.zeros(len(byte_end_N), np.uint8)
    for start, end in spans:
        start_byte, end_byte = len(text[:start].encode()), len(text[:end].encode())
        inside_N |= ((byte_end_N > start_byte) & (byte_end_N <= end_byte)).astype(np.uint8)
    return inside_N


def _truncated(window: TokenSequence, max_tokens: float) -> TokenSequence:
    if len(window.input_ids_N) <= max_tokens:
        return window
    n = int(max_tokens)
    return replace(
        window, input_ids_N=window.input_ids_N[:n], loss_mask_N=window.loss_mask_N[:n], byte_end_N=window.byte_end_N[:n]
    )
