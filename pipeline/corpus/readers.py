"""Readers: files, folders and the Python reference as rows, one at a time.

A row is a dict of a document's fields (see documents.py), with the place that error messages name, such as
`d.jsonl:3`. A reader supplies the `id` where its source has none.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.storage.failures import failure_types
from pipeline.errors import CorpusError

Rows: TypeAlias = Iterator[tuple[str, dict[str, Any]]]

PYTHON_DOCS = "python-docs"
MAX_REPEATED = 0.2
MIN_PARAGRAPH_CHARACTERS = 40
"""Shorter paragraphs, such as headings, may repeat in different texts."""


def read_rows(source: str) -> Rows:
    """Yield (place, row) of a source, always in the same order: `python-docs`, or a path or URI of a file or folder.

    A folder is read recursively, by sorted paths; hidden files and other formats in it are skipped. Raises CorpusError,
    with file and line, for what cannot be read.
    """
    return _python_docs() if source == PYTHON_DOCS else _files(source)


def _files(source: str) -> Rows:
    try:
        filesystem, root = fsspec.core.url_to_fs(source)
        if not filesystem.exists(root):
            raise CorpusError(f"corpus {source}: no such file or folder")
        is_folder = filesystem.isdir(root)
        folder = root if is_folder else root.rpartition("/")[0]
        for path in sorted(filesystem.find(root)) if is_folder else [root]:
            name = path.removeprefix(folder).lstrip("/")
            suffix = next((suffix for suffix in READERS if name.lower().endswith(suffix)), None)
            if suffix is None and not is_folder:
                raise CorpusError(f"corpus {source}: expected a folder or a file of {', '.join(READERS)}")
            is_hidden = is_folder and any(part.startswith((".", "_")) for part in name.split("/"))
            if suffix is not None and not is_hidden:
                with filesystem.open(path, "rb") as file:
                    yield from READERS[suffix](file, name)
    except ImportError as error:
        raise CorpusError(f"corpus {source}: {error}") from error
    except failure_types(ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise CorpusError(f"corpus {source}: cannot be read: {reason}") from error


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
        batches = table.iter_batches(batch_size=256, columns=columns)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            fields = {key: value for key, value in row.items() if value is not None}
            yield f"{name} row {number}", {"id": f"{name}:{number}", **fields}
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise CorpusError(f"corpus {name}: not a readable Parquet file: {' '.join(str(error).split())}") from error


READERS = {".jsonl": _jsonl, ".parquet": _parquet, ".txt": _txt}
"""By file name suffix: (open binary file, its path below the source) -> rows."""


def _decode(data: bytes, name: str, line: int) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        bad_line = line + data[: error.start].count(b"\n")
        raise CorpusError(f"corpus {name}:{bad_line}: expected UTF-8, got byte 0x{data[error.start]:02x}") from error


def _python_docs() -> Rows:
    from pydoc_data.topics import topics

    for topic in sorted(deduplicated(topics)):
        name = f"{PYTHON_DOCS}/{topic}"
        yield name, {"id": name, "text": topics[topic], "domain": PYTHON_DOCS}


def deduplicated(texts: Mapping[str, str]) -> list[str]:
    """Return the names of texts that do not repeat longer ones, longest first.

    A text is left out if more than MAX_REPEATED of the characters in its long paragraphs are in paragraphs of longer
    texts that are kept. The Python reference needs this: `compound` contains `for`, `if` and `while`, so a split by
    document would hold out text that is also trained on.
    """
    seen: set[str] = set()
    kept = []
    for name in sorted(texts, key=lambda name: (-len(texts[name]), name)):
        paragraphs = [" ".join(part.split()) for part in texts[name].split("\n\n")]
        long = [part for part in paragraphs if len(part) > MIN_PARAGRAPH_CHARACTERS]
        repeated = sum(len(part) for part in long if part in seen)
        if repeated <= MAX_REPEATED * sum(len(part) for part in long):
            seen.update(long)
            kept.append(name)
    return kept
