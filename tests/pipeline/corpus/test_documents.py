import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import CorpusSpec
from pipeline.contracts import Document, Message
from pipeline.corpus.documents import corpus_digest, read_documents
from pipeline.errors import CorpusError

MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
TYPES = {"id": pa.string(), "text": pa.string(), "domain": pa.string(), "messages": MESSAGES}


def read(path, **settings):
    return list(read_documents(CorpusSpec(source=str(path), **settings)))


def write_lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def refusal(path):
    with pytest.raises(CorpusError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_json_lines_contain_texts_and_chats(tmp_path):
    path = write_lines(
        tmp_path / "d.jsonl",
        {"id": "a", "text": "hello", "domain": "x", "score": 3},
        "",
        {"id": 7, "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"text": "without id"},
    )
    first, second, third = read(path, domain="default")
    assert first == Document(id="a", text="hello", domain="x")
    assert second.messages == (Message("user", "hi"), Message("assistant", "ho"))
    assert (second.id, second.domain, third.id) == ("7", "default", "d.jsonl:4")


def test_parquet_rows_contain_texts_and_chats(tmp_path):
    chat = {"id": "c", "text": None, "messages": [{"role": "user", "content": "hi"}]}
    rows = [{"id": "a", "text": "hello", "domain": None}, {"id": "b", "text": "there", "domain": "x"}, chat]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(TYPES)), tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet") == [
        Document(id="a", text="hello"),
        Document(id="b", text="there", domain="x"),
        Document(id="c", messages=(Message("user", "hi"),)),
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"id": "x"}', "one of text and messages, got neither (fields: ['id'])"),
        ('{"id": "x", "text": "a", "messages": []}', "got both"),
        ('{"id": "x", "text": 5}', "text: expected text, got int"),
        ('{"id": "x", "text": ""}', "document 'x': expected text, got an empty one"),
        ('{"id": "", "text": "a"}', "id: expected 1..1024 characters, got 0"),
        ('{"id": true, "text": "a"}', "id: expected text, got bool"),
        ('{"id": "x", "messages": []}', "at least one message"),
        ('{"id": "x", "messages": ["hi"]}', "messages[0]: expected role and content, got str"),
        ('{"id": "x", "messages": [{"role": "user"}]}', "messages[0]: expected role and content, got ['role']"),
        ('{"id": "x", "messages": [{"role": "user", "content": "", "tool_calls": [1]}]}', "tool_calls"),
        (r'{"id": "x", "text": "\ud800"}', "half a surrogate pair U+D800"),
        ('{"id": "ok", "text": "a"}', "expected unique ids, got id 'ok' again"),
    ],
)
def test_an_invalid_row_is_refused_with_file_and_line(tmp_path, line, words):
    message = refusal(write_lines(tmp_path / "d.jsonl", {"id": "ok", "text": "fine"}, line))
    assert message.startswith(("corpus d.jsonl:2: ", "corpus d.jsonl:2 messages[0]: "))
    assert words in message


def test_an_invalid_parquet_row_is_refused_with_its_number(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"id": "a", "text": "x"}, {"id": "b", "text": None}]), tmp_path / "d.parquet")
    assert refusal(tmp_path / "d.parquet").startswith("corpus d.parquet row 2: expected one of text and messages")


def test_a_source_without_documents_is_refused(tmp_path):
    assert "got none" in refusal(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "got none" in refusal(tmp_path / "empty.jsonl")


def test_the_same_id_in_two_files_is_refused(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"id": "x", "text": "one"})
    write_lines(tmp_path / "b.jsonl", {"id": "x", "text": "two"})
    assert refusal(tmp_path) == "corpus b.jsonl:1: expected unique ids, got id 'x' again"


def test_documents_are_read_one_at_a_time(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", {"id": "a", "text": "x"}, "broken")
    documents = read_documents(CorpusSpec(source=str(path)))
    assert next(documents).id == "a"


def test_the_digest_changes_with_content_order_id_and_domain():
    a, b = Document(id="a", text="x"), Document(id="b", text="y")
    variants = [[a, b], [b, a], [a], [Document(id="a", text="x", domain="d"), b], [Document(id="a", text="z"), b]]
    assert len({corpus_digest(variant) for variant in variants}) == len(variants)
    assert corpus_digest([a, b]) == corpus_digest(iter([a, b]))
