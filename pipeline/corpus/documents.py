"""Documents from text, JSON lines, Parquet, folders of these, or the Python reference: one at a time.

A `.txt` file is one document, named by its path below the source. A row of `.jsonl` and `.parquet` has `id` (default:
`<file>:<row>`), exactly one of `text` and `messages` (a list of `{role, content}`), and optionally `domain`; other
columns are left alone. What teachers wrote (`pipeline.corpus.answers`) also has `prompt`, `finished` and `prompt_id`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.storage.remote import failure_types
from pipeline.config import CorpusSpec
from pipeline.contracts import Document, Message, Split
from pipeline.errors import CorpusError
from pipeline.identity import canonical_json, uniform

PYTHON_DOCS = "python-docs"
SUFFIXES = (".jsonl", ".parquet", ".txt")
MAX_ID_CHARACTERS = 1024
MAX_REPEATED = 0.2
REPEAT_CHARACTERS = 40
"""Shorter paragraphs are headings and the like, which may well stand twice."""


def read_documents(spec: CorpusSpec) -> Iterator[Document]:
    """The corpus' documents, in an order that is always the same.

    Raises CorpusError, with file and line, for what cannot be read or used, for an id that stands twice, and where
    there is no document at all.
    """
    rows = _python_docs() if spec.source == PYTHON_DOCS else _files(spec.source)
    seen: set[bytes] = set()
    for place, row in rows:
        document = to_document(row, place, spec.domain)
        key = hashlib.sha256(document.id.encode()).digest()[:16]
        if key in seen:
            raise CorpusError(f"corpus {place}: id {document.id!r} stands twice")
        seen.add(key)
        yield document
    if not seen:
        raise CorpusError(f"corpus {spec.source}: expected at least one document, got none")


def split_of(document_id: str, held_out: float, seed: int) -> Split:
    """The side that a document's id falls on, by a hash: `held_out` with that probability, always the same one."""
    return "held_out" if _position(document_id, seed) < held_out else "train"


class Splitter:
    """The side of every document of a corpus: `split_of`, with at least one document on each side where that can be.

    Where the hash puts all documents on one side, the one nearest to the border changes over: which one is decided by
    the set of ids alone, not by their order. A single document is for training, unless all is held out.
    """

    def __init__(self, ids: Iterable[str], held_out: float, seed: int) -> None:
        """Looks at ids only until both sides have one."""
        self._held_out, self._seed = held_out, seed
        self._moved: dict[str, Split] = {}
        if 0.0 < held_out < 1.0:
            self._moved = self._one_on_each_side(ids)

    def __call__(self, document_id: str) -> Split:
        """The side of that document."""
        return self._moved.get(document_id) or split_of(document_id, self._held_out, self._seed)

    def _one_on_each_side(self, ids: Iterable[str]) -> dict[str, Split]:
        lowest: tuple[float, str] | None = None
        highest: tuple[float, str] | None = None
        for document_id in ids:
            ranked = (_position(document_id, self._seed), document_id)
            lowest = min(lowest or ranked, ranked)
            highest = max(highest or ranked, ranked)
            if lowest[0] < self._held_out <= highest[0]:
                return {}
        if lowest is None or highest is None:
            return {}
        if highest[0] < self._held_out:
            return {highest[1]: "train"}
        return {} if lowest == highest else {lowest[1]: "held_out"}


def corpus_digest(documents: Iterable[Document]) -> str:
    """sha256 over documents in their order: ids, texts or messages, domains."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document_digest(document).encode())
    return digest.hexdigest()


def document_digest(document: Document) -> str:
    """sha256 over one document's id, content and domain."""
    messages = document.messages and [[message.role, message.content] for message in document.messages]
    answer = [document.prompt, document.finished, document.prompt_id] if document.prompt else []
    content = canonical_json([document.id, document.text, messages, document.domain, *answer])
    return hashlib.sha256(content.encode()).hexdigest()


def _position(document_id: str, seed: int) -> float:
    return uniform("split", seed, document_id)


# ---- where rows come from: each yields (place, row), the place being what an error names ----

Rows = Iterator[tuple[str, dict[str, Any]]]


def _python_docs() -> Rows:
    from pydoc_data.topics import topics

    for topic in sorted(without_repeats(topics)):
        row = {"id": f"{PYTHON_DOCS}/{topic}", "text": topics[topic], "domain": PYTHON_DOCS}
        yield f"{PYTHON_DOCS}/{topic}", row


def without_repeats(texts: Mapping[str, str]) -> list[str]:
    """Names of the texts that say something new, longest first.

    The topics repeat each other (`compound` holds all of `for`, `if` and `while`): a split by document would hold out
    what is trained on under another name. A text is left out where more than MAX_REPEATED of its long paragraphs, by
    characters, stand in longer texts that are kept.
    """
    seen: set[str] = set()
    kept = []
    for name in sorted(texts, key=lambda name: (-len(texts[name]), name)):
        paragraphs = [" ".join(part.split()) for part in texts[name].split("\n\n")]
        long = [part for part in paragraphs if len(part) > REPEAT_CHARACTERS]
        repeated = sum(len(part) for part in long if part in seen)
        if repeated <= MAX_REPEATED * sum(len(part) for part in long):
            seen.update(long)
            kept.append(name)
    return kept


def _files(source: str) -> Rows:
    try:
        filesystem, root = fsspec.core.url_to_fs(source)
        names = sorted(filesystem.find(root)) if filesystem.isdir(root) else [root]
        if not filesystem.exists(root):
            raise CorpusError(f"corpus {source}: no such file or folder")
        folder = root if filesystem.isdir(root) else root.rpartition("/")[0]
        for path in names:
            name = path.removeprefix(folder).lstrip("/")
            read = _reader_of(name, source, chosen=path == root)
            if read is not None:
                with filesystem.open(path, "rb") as file:
                    yield from read(file, name)
    except ImportError as error:
        raise CorpusError(f"corpus {source}: {error}") from error
    except _unreadable() as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CorpusError(f"corpus {source}: cannot be read: {reason}") from error


def _unreadable() -> tuple[type[Exception], ...]:
    """What a file system raises, by the clients that are loaded when it does."""
    return (ValueError, *failure_types())


def _reader_of(name: str, source: str, *, chosen: bool) -> Callable[[Any, str], Rows] | None:
    """How a file is read. Hidden files and other kinds are passed over in a folder, refused where they are named."""
    kind = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), None)
    if kind is None and chosen:
        raise CorpusError(f"corpus {source}: expected a folder or a file of {', '.join(SUFFIXES)}")
    if kind is None or (not chosen and any(part.startswith((".", "_")) for part in name.split("/"))):
        return None
    return {".jsonl": _jsonl, ".parquet": _parquet, ".txt": _txt}[kind]


def _txt(file: Any, name: str) -> Rows:
    yield name, {"id": name, "text": _decode(file.read(), name, 1)}


def _jsonl(file: Any, name: str) -> Rows:
    for number, line in enumerate(file, start=1):
        text = _decode(line, name, number)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"corpus {name}:{number}: not JSON: {' '.join(str(error).split())}") from error
        if not isinstance(row, dict):
            raise CorpusError(f"corpus {name}:{number}: expected an object, got {type(row).__name__}")
        yield f"{name}:{number}", {"id": f"{name}:{number}", **row}


def _parquet(file: Any, name: str) -> Rows:
    try:
        table = pq.ParquetFile(file)
        columns = [column for column in table.schema_arrow.names if column in ("id", "text", "messages", "domain")]
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                number += 1
                given = {key: value for key, value in row.items() if value is not None}
                yield f"{name} row {number}", {"id": f"{name}:{number}", **given}
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise CorpusError(f"corpus {name}: not a readable Parquet file: {' '.join(str(error).split())}") from error


def _decode(data: bytes, name: str, line: int) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        at = line + data[: error.start].count(b"\n")
        raise CorpusError(f"corpus {name}:{at}: expected UTF-8, got byte 0x{data[error.start]:02x}") from error


# ---- from a row to a document ----


def to_document(row: dict[str, Any], place: str, default_domain: str | None) -> Document:
    """A row as a document, `place` being its name in errors. Raises CorpusError."""
    text, messages, domain = row.get("text"), row.get("messages"), row.get("domain")
    if (text is None) == (messages is None):
        got = "neither" if text is None else "both"
        raise CorpusError(f"corpus {place}: expected one of text and messages, got {got} (fields: {sorted(row)})")
    document = Document(
        id=_id(row["id"], place),
        text=None if text is None else _text(text, place, "text"),
        messages=None if messages is None else _messages(messages, place),
        domain=default_domain if domain is None else _text(domain, place, "domain"),
        prompt=_prompt(row.get("prompt", 0), len(text or messages or ""), place),
        finished=bool(row.get("finished", True)),
        prompt_id=_prompt_id(row, place),
    )
    if document.text == "":
        raise CorpusError(f"corpus {place}: document {document.id!r} is empty: it has no tokens to learn from")
    return document


def _id(value: Any, place: str) -> str:
    name = str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value, place, "id")
    if not 0 < len(name) <= MAX_ID_CHARACTERS:
        raise CorpusError(f"corpus {place}: id: expected 1..{MAX_ID_CHARACTERS} characters, got {len(name)}")
    return name


def _prompt(value: Any, length: int, place: str) -> int:
    """Other corpora call a text of their own `prompt`; that is left alone."""
    if not isinstance(value, int) or isinstance(value, bool):
        return 0
    if not 0 <= value <= length:
        raise CorpusError(f"corpus {place}: prompt: expected 0..{length}, got {value}")
    return value


def _prompt_id(row: dict[str, Any], place: str) -> str | None:
    """Left alone where the row is no answer."""
    is_answer = isinstance(row.get("prompt"), int) and row.get("prompt_id") is not None
    return _text(row["prompt_id"], place, "prompt_id") if is_answer else None


def _messages(value: Any, place: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise CorpusError(f"corpus {place}: messages: expected a list of at least one message")
    return tuple(_message(item, f"{place} messages[{number}]") for number, item in enumerate(value))


def _message(value: Any, place: str) -> Message:
    given = {key for key, item in value.items() if item is not None} if isinstance(value, dict) else None
    if given != {"role", "content"}:
        got = type(value).__name__ if given is None else sorted(given)
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
