"""Answers that teachers generate to the corpus' prompts, stored in `generated/` of the teacher's cache.

Each file contains the answers to one batch of prompts, as JSON lines in the corpus' order, and is a valid corpus. Its
name contains a fingerprint of prompts and sampling, so that answers to other prompts or with other sampling are not
reused. It is created if absent: the first of two writers wins, and an interrupted run continues after the last file. A
prompt that kills the engine is in `quarantine/` instead.

An answer's id is `<prompt>@<teacher>`, so that several teachers' answers to one prompt have different ids.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
"""Maps prompts to the same documents with answers, lazily and in order."""


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts whose answers are in one file."""

    path: str
    author: str
    """Name of the teacher that answers."""
    prompts: tuple[Document, ...]

    @classmethod
    def of(cls, number: int, prompts: Sequence[Document], author: str, identity: Mapping[str, Any]) -> "PromptBatch":
        """Make the `number`-th batch; `identity` is the author's model and sampling. Raises CorpusError."""
        for prompt in prompts:
            check_prompt(prompt, author)
        key = fingerprint({"prompts": corpus_digest(prompts), "author": author, "by": dict(identity)})
        return cls(answers_path(number, key), author, tuple(prompts))

    @property
    def names(self) -> list[str]:
        """`prompt_name` of each prompt."""
        return [prompt_name(prompt, self.author) for prompt in self.prompts]


def answer_id(prompt: Document, author: str) -> str:
    """Return the id of the author's answer to a prompt."""
    return f"{prompt.id}@{author}"


def prompt_name(prompt: Document, author: str) -> str:
    """Return the name of a prompt in engines and in the quarantine: the id of its answer's first sequence."""
    return sequence_id(answer_id(prompt, author), 0)


def check_prompt(document: Document, author: str) -> None:
    """Raise CorpusError for a chat whose last message is not the user's, and if the answer's id would be too long."""
    if len(answer_id(document, author)) > MAX_ID_CHARACTERS:
        raise CorpusError(
            f"corpus document {document.id[:40]!r}...: id: expected at most {MAX_ID_CHARACTERS - len(author) - 1} "
            f"characters, since teacher {author} appends its name, got {len(document.id)}"
        )
    if document.messages is not None and document.messages[-1].role != "user":
        raise CorpusError(
            f"corpus document {document.id!r}: expected a chat that ends with the user's turn, since "
            f"teachers.sampling is set, got one that ends with the {document.messages[-1].role}'s"
        )


def append_answer(prompt: Document, answer: str, author: str, *, finished: bool) -> Document:
    """Return prompt and answer as one document, in which only the answer has labels. An empty one adds no message."""
    prompt = replace(prompt, id=answer_id(prompt, author), prompt_id=prompt.split_id)
    if prompt.messages is None:
        text = prompt.text or ""
        return replace(prompt, text=text + answer, prompt=len(text), finished=finished)
    messages = (*prompt.messages, Message("assistant", answer)) if answer else prompt.messages
    return replace(prompt, messages=messages, prompt=len(prompt.messages), finished=finished)


def write_answers(store: Store, path: str, documents: Sequence[Document]) -> None:
    """Store the answers to a batch, unless the file exists."""
    store.put_if_absent(path, "".join(f"{canonical_json(_row(document))}\n" for document in documents).encode())


def read_answers(store: Store, path: str) -> list[Document] | None:
    """Return the answers to a batch; None if there is no file. Raises DamageError."""
    data = store.read_if_present(path)
    if data is None:
        return None
    try:
        return [to_document(json.loads(line), store.where(path), None) for line in data.decode().splitlines()]
    except (ValueError, TypeError, CorpusError) as error:
        raise DamageError(f"answers {store.where(path)}: expected one document per line: {error}") from error


def quarantined_prompts(store: Store) -> list[str]:
    """Return the names of quarantined prompts, except those that a later attempt has answered."""
    quarantined = [entry for entry in quarantine.entries(store) if entry.unit_id.startswith(f"{GENERATED}/")]
    answers = {path: read_answers(store, path) or () for path in {entry.unit_id for entry in quarantined}}
    answered = {sequence_id(document.id, 0) for documents in answers.values() for document in documents}
    return [entry.sequence_id for entry in quarantined if entry.sequence_id not in answered]


def _row(document: Document) -> dict[str, Any]:
    """Return a row that `to_document` reads."""
    return {name: value for name, value in asdict(document).items() if value is not None}
