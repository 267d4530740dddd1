"""What a teacher wrote to a corpus' prompts, kept as a corpus of its own: `generated/` in the teacher's cache.

One file of JSON lines holds the answered documents of one batch of prompts, in the corpus' order. Its name holds a hash
of what they depend on, and it is created if absent: of two writers one wins, an interrupted run goes on behind the last
file, and what was written for other prompts or with other sampling is never taken.

A later recipe may name the folder as its `corpus.source`: then another teacher scores these very answers.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from pipeline.cache.layout import answers_path
from pipeline.cache.storage import Store
from pipeline.contracts import Document, Message
from pipeline.corpus import corpus_digest, to_document
from pipeline.errors import CorpusError, DamageError
from pipeline.identity import canonical_json, fingerprint

Answerer: TypeAlias = Callable[[Iterator[Document]], Iterator[Document]]
"""Prompts in, the same documents with their answers out, in order, as they are asked for."""


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts that are answered together, and the file that their answers go to."""

    path: str
    prompts: tuple[Document, ...]

    @classmethod
    def of(cls, number: int, prompts: Sequence[Document], identity: Mapping[str, Any]) -> "PromptBatch":
        """The `number`-th batch. `identity` says who answers, and how. Raises CorpusError for what is no prompt."""
        for prompt in prompts:
            check_prompt(prompt)
        key = fingerprint({"prompts": corpus_digest(prompts), "by": dict(identity)})
        return cls(answers_path(number, key), tuple(prompts))


def check_prompt(document: Document) -> None:
    """Raise CorpusError for a chat that does not end with the user's turn."""
    if document.messages is not None and document.messages[-1].role != "user":
        raise CorpusError(
            f"corpus document {document.id!r}: expected a chat that ends with the user's turn, since "
            f"teachers.sampling is set, got one that ends with the {document.messages[-1].role}'s"
        )


def answered(prompt: Document, answer: str, *, finished: bool) -> Document:
    """The prompt and its answer as one document, in which the answer alone counts. An empty answer adds no label."""
    if prompt.messages is None:
        text = prompt.text or ""
        return replace(prompt, text=text + answer, prompt=len(text), finished=finished)
    turns = (*prompt.messages, Message("assistant", answer)) if answer else prompt.messages
    return replace(prompt, messages=turns, prompt=len(prompt.messages), finished=finished)


def write_answers(store: Store, path: str, documents: Sequence[Document]) -> None:
    """Keep a batch's answers, unless they are there."""
    store.put_if_absent(path, "".join(f"{canonical_json(_row(document))}\n" for document in documents).encode())


def read_answers(store: Store, path: str) -> list[Document] | None:
    """A batch's answered documents, or None. Raises DamageError."""
    data = store.read_if_present(path)
    if data is None:
        return None
    try:
        return [to_document(json.loads(line), store.where(path), None) for line in data.decode().splitlines()]
    except (ValueError, TypeError, CorpusError) as error:
        raise DamageError(f"answers {store.where(path)}: not what was written: {error}") from error


def _row(document: Document) -> dict[str, Any]:
    """What `corpus` reads back."""
    row: dict[str, Any] = {"id": document.id, "prompt": document.prompt, "finished": document.finished}
    if document.domain is not None:
        row["domain"] = document.domain
    if document.messages is None:
        return {**row, "text": document.text}
    return {**row, "messages": [{"role": m.role, "content": m.content} for m in document.messages]}
