"""What a teacher wrote to a corpus' prompts, kept as a corpus of its own: `generated/` in the teacher's cache.

One file of JSON lines holds the answered documents of one batch of prompts, in the corpus' order. Its name holds a hash
of what they depend on, and it is created if absent: of two writers one wins, an interrupted run goes on behind the last
file, and what was written for other prompts or with other sampling is never taken. A prompt that no engine survives
is in `quarantine/` instead.

An answer's id is `<prompt>@<teacher>`, so that answers of several teachers to one prompt can be told apart: in a recipe
with `capture.answers: all`, and in folders that a later recipe names as its `corpus.source`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from pipeline.cache import quarantine
from pipeline.cache.storage.layout import GENERATED, answers_path
from pipeline.cache.storage.store import Store
from pipeline.contracts import Document, Message
from pipeline.corpus.documents import MAX_ID_CHARACTERS, corpus_digest, to_document
from pipeline.corpus.windows import sequence_id
from pipeline.errors import CorpusError, DamageError
from pipeline.identity import canonical_json, fingerprint

Answerer: TypeAlias = Callable[[Iterator[Document]], Iterator[Document]]
"""Prompts in, the same documents with their answers out, in order, as they are asked for."""


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts that are answered together, and the file that their answers go to."""

    path: str
    author: str
    """The teacher's name."""
    prompts: tuple[Document, ...]

    @classmethod
    def of(cls, number: int, prompts: Sequence[Document], author: str, identity: Mapping[str, Any]) -> "PromptBatch":
        """The `number`-th batch. `identity` says how the author answers. Raises CorpusError for what is no prompt."""
        for prompt in prompts:
            check_prompt(prompt, author)
        key = fingerprint({"prompts": corpus_digest(prompts), "author": author, "by": dict(identity)})
        return cls(answers_path(number, key), author, tuple(prompts))

    @property
    def names(self) -> list[str]:
        """Of the prompts, as engines and the quarantine call them."""
        return [prompt_name(prompt, self.author) for prompt in self.prompts]


def answer_id(prompt: Document, author: str) -> str:
    """The id of that teacher's answer to the prompt."""
    return f"{prompt.id}@{author}"


def prompt_name(prompt: Document, author: str) -> str:
    """What engines, inquests and the quarantine call the prompt: the first sequence of its answer."""
    return sequence_id(answer_id(prompt, author), 0)


def check_prompt(document: Document, author: str) -> None:
    """Raise CorpusError for a chat that does not end with the user's turn, and where an answer's id gets too long."""
    if len(answer_id(document, author)) > MAX_ID_CHARACTERS:
        raise CorpusError(
            f"corpus document {document.id[:40]!r}...: id: expected at most {MAX_ID_CHARACTERS - len(author) - 1} "
            f"characters, since teacher {author} answers, got {len(document.id)}"
        )
    if document.messages is not None and document.messages[-1].role != "user":
        raise CorpusError(
            f"corpus document {document.id!r}: expected a chat that ends with the user's turn, since "
            f"teachers.sampling is set, got one that ends with the {document.messages[-1].role}'s"
        )


def append_answer(prompt: Document, answer: str, author: str, *, finished: bool) -> Document:
    """The prompt and its answer as one document, in which the answer alone counts. An empty answer adds no label."""
    prompt = replace(prompt, id=answer_id(prompt, author), prompt_id=prompt.split_id)
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


def quarantined_prompts(store: Store) -> list[str]:
    """Names of the prompts in quarantine. One whose answer stands was answered after all, by a later attempt."""
    refused = [entry for entry in quarantine.entries(store) if entry.unit_id.startswith(f"{GENERATED}/")]
    answers = {path: read_answers(store, path) or () for path in {entry.unit_id for entry in refused}}
    written = {sequence_id(document.id, 0) for documents in answers.values() for document in documents}
    return [entry.sequence_id for entry in refused if entry.sequence_id not in written]


def _row(document: Document) -> dict[str, Any]:
    """What `corpus` reads back."""
    row: dict[str, Any] = {"id": document.id, "prompt": document.prompt, "finished": document.finished}
    row["prompt_id"] = document.prompt_id
    if document.domain is not None:
        row["domain"] = document.domain
    if document.messages is None:
        return {**row, "text": document.text}
    return {**row, "messages": [{"role": m.role, "content": m.content} for m in document.messages]}
