"""Documents: validated rows, with unique ids, and their digests.

Fields of a row: `id` (text or integer), exactly one of `text` and `messages` (a list of `{role, content}`), optionally
`domain`; other fields are ignored. Answers of teachers (answers.py) are JSON lines that also have `prompt`, `finished`
and `prompt_id`, as the attributes of `Document`.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.config import CorpusSpec
from pipeline.contracts import Document, Message
from pipeline.corpus.readers import read_rows
from pipeline.errors import CorpusError
from pipeline.identity import canonical_json, sha256_bytes

MAX_ID_CHARACTERS = 1024


def read_documents(spec: CorpusSpec) -> Iterator[Document]:
    """Yield the documents of a corpus, always in the same order.

    Raises CorpusError, with file and line, for unreadable or invalid rows and for duplicate ids, and where there is no
    document.
    """
    seen: set[bytes] = set()
    for place, row in read_rows(spec.source):
        document = to_document(row, place, spec.domain)
        key = hashlib.sha256(document.id.encode()).digest()[:16]
        if key in seen:
            raise CorpusError(f"corpus {place}: expected unique ids, got id {document.id!r} again")
        seen.add(key)
        yield document
    if not seen:
        raise CorpusError(f"corpus {spec.source}: expected at least one document, got none")


def corpus_digest(documents: Iterable[Document]) -> str:
    """Return the sha256 over the digests of documents, in their order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document_digest(document).encode())
    return digest.hexdigest()


def document_digest(document: Document) -> str:
    """Return the sha256 of a document's id, content and domain, and of what makes it an answer."""
    messages = document.messages and [[message.role, message.content] for message in document.messages]
    answer = [document.prompt, document.finished, document.prompt_id] if document.prompt else []
    return sha256_bytes(canonical_json([document.id, document.text, messages, document.domain, *answer]).encode())


def to_document(row: dict[str, Any], place: str, default_domain: str | None) -> Document:
    """Validate a row. `place` names it in errors. Raises CorpusError."""
    text, messages, domain = row.get("text"), row.get("messages"), row.get("domain")
    if (text is None) == (messages is None):
        got = "neither" if text is None else "both"
        raise CorpusError(f"corpus {place}: expected one of text and messages, got {got} (fields: {sorted(row)})")
    is_answer = isinstance(row.get("prompt"), int) and row.get("prompt_id") is not None
    document = Document(
        id=_id(row["id"], place),
        text=None if text is None else _text(text, place, "text"),
        messages=None if messages is None else _messages(messages, place),
        domain=default_domain if domain is None else _text(domain, place, "domain"),
        prompt=_prompt(row.get("prompt", 0), len(text or messages or ""), place),
        finished=bool(row.get("finished", True)),
        prompt_id=_text(row["prompt_id"], place, "prompt_id") if is_answer else None,
    )
    if document.text == "":
        raise CorpusError(f"corpus {place}: document {document.id!r}: expected text, got an empty one")
    return document


def _id(value: Any, place: str) -> str:
    name = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value, place, "id")
    if not 0 < len(name) <= MAX_ID_CHARACTERS:
        raise CorpusError(f"corpus {place}: id: expected 1..{MAX_ID_CHARACTERS} characters, got {len(name)}")
    return name


def _prompt(value: Any, length: int, place: str) -> int:
    """Return the length of the prompt. Other corpora have a text in a field of this name, which is ignored."""
    if not isinstance(value, int) or isinstance(value, bool):
        return 0
    if not 0 <= value <= length:
        raise CorpusError(f"corpus {place}: prompt: expected 0..{length}, got {value}")
    return value


def _messages(value: Any, place: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise CorpusError(f"corpus {place}: messages: expected a list of at least one message")
    return tuple(_message(item, f"{place} messages[{number}]") for number, item in enumerate(value))


def _message(value: Any, place: str) -> Message:
    fields = {key for key, item in value.items() if item is not None} if isinstance(value, dict) else None
    if fields != {"role", "content"}:
        got = type(value).__name__ if fields is None else sorted(fields)
        raise CorpusError(f"corpus {place}: expected role and content, got {got}")
    return Message(role=_text(value["role"], place, "role"), content=_text(value["content"], place, "content"))


def _text(value: Any, place: str, field: str) -> str:
    if not isinstance(value, str):
        raise CorpusError(f"corpus {place}: {field}: expected text, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        bad = f"U+{ord(value[error.start]):04X}"
        raise CorpusError(f"corpus {place}: {field}: expected Unicode text, got half a surrogate pair {bad}") from error
    return value
