import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import CorpusSpec
from pipeline.contracts import Document, Message
from pipeline.corpus.documents import Splitter, corpus_digest, read_documents, split_of, without_repeats
from pipeline.errors import CorpusError


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


def test_a_text_that_longer_ones_say_already_is_left_out():
    first, second, third = (f"paragraph {n} is long enough to count as one of its own, surely" for n in "abc")
    texts = {"whole": f"{first}\n\n{second}", "part": second, "wrapped": second.replace(" ", "\n"), "new": third}
    assert sorted(without_repeats(texts)) == ["new", "whole"]


def test_no_python_topic_hides_in_another():
    texts = {document.id: document.text for document in read("python-docs")}
    assert sorted(without_repeats(texts)) == sorted(texts)
    assert "python-docs/compound" in texts
    assert "python-docs/while" not in texts


def test_python_docs_ship_with_python():
    documents = read("python-docs")
    assert len(documents) > 50
    assert documents[0].id.startswith("python-docs/")
    assert sum(len(d.text) for d in documents) > 300_000
    assert documents == read("python-docs")


def test_a_text_file_is_one_document_named_after_it(tmp_path):
    (tmp_path / "note.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\0three")
    assert read(tmp_path / "note.txt", domain="notes") == [
        Document(id="note.txt", text="one\r\ntwo\0three", domain="notes")
    ]


def test_json_lines_hold_texts_and_chats(tmp_path):
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


def test_parquet_rows_are_read_like_json_lines(tmp_path):
    rows = [{"id": "a", "text": "hello", "domain": None}, {"id": "b", "text": "there", "domain": "x"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet") == [
        Document(id="a", text="hello"),
        Document(id="b", text="there", domain="x"),
    ]


def test_parquet_chats(tmp_path):
    rows = [{"id": "a", "messages": [{"role": "user", "content": "hi"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet") == [Document(id="a", messages=(Message("user", "hi"),))]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "sub" / "a.txt").write_text("a")
    write_lines(tmp_path / "a.jsonl", {"id": "first", "text": "x"})
    (tmp_path / "README.md").write_text("passed over")
    (tmp_path / ".hidden.txt").write_text("passed over")
    assert [d.id for d in read(tmp_path)] == ["first", "b.txt", "sub/a.txt"]


def test_a_corpus_is_read_from_any_filesystem(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe_file("/corpus-test/a.txt", b"text")
    assert [d.id for d in read("memory://corpus-test")] == ["a.txt"]
    memory.rm("/corpus-test", recursive=True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "expected an object, got list"),
        ('{"id": "x"}', "one of text and messages, got neither (fields: ['id'])"),
        ('{"id": "x", "text": "a", "messages": []}', "got both"),
        ('{"id": "x", "text": 5}', "text: expected text, got int"),
        ('{"id": "x", "text": ""}', "document 'x' is empty"),
        ('{"id": "", "text": "a"}', "id: expected 1..1024 characters, got 0"),
        ('{"id": true, "text": "a"}', "id: expected text, got bool"),
        ('{"id": "x", "messages": []}', "at least one message"),
        ('{"id": "x", "messages": ["hi"]}', "messages[0]: expected role and content, got str"),
        ('{"id": "x", "messages": [{"role": "user"}]}', "messages[0]: expected role and content, got ['role']"),
        ('{"id": "x", "messages": [{"role": "user", "content": "", "tool_calls": [1]}]}', "tool_calls"),
        (r'{"id": "x", "text": "\ud800"}', "half a surrogate pair U+D800"),
        ('{"id": "ok", "text": "a"}', "id 'ok' stands twice"),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(tmp_path, line, words):
    message = refusal(write_lines(tmp_path / "d.jsonl", {"id": "ok", "text": "fine"}, line))
    assert message.startswith(("corpus d.jsonl:2: ", "corpus d.jsonl:2 messages[0]: "))
    assert words in message


def test_invalid_utf8_is_refused_with_its_line(tmp_path):
    (tmp_path / "d.txt").write_bytes(b"one\ntwo\nth\xffree")
    assert refusal(tmp_path / "d.txt") == "corpus d.txt:3: expected UTF-8, got byte 0xff"
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert refusal(tmp_path / "d.jsonl") == "corpus d.jsonl:2: expected UTF-8, got byte 0xff"


def test_a_bad_parquet_row_is_refused_with_its_number(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"id": "a", "text": "x"}, {"id": "b", "text": None}]), tmp_path / "d.parquet")
    assert refusal(tmp_path / "d.parquet").startswith("corpus d.parquet row 2: expected one of text and messages")


def test_a_parquet_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "d.parquet").write_bytes(b"PAR1 nothing here PAR1")
    assert "not a readable Parquet file" in refusal(tmp_path / "d.parquet")


def test_what_is_not_there_or_holds_nothing_is_refused(tmp_path):
    assert "no such file or folder" in refusal(tmp_path / "missing")
    assert "got none" in refusal(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "got none" in refusal(tmp_path / "empty.jsonl")
    (tmp_path / "data.csv").write_text("a,b")
    assert "expected a folder or a file of .jsonl, .parquet, .txt" in refusal(tmp_path / "data.csv")
    assert "cannot be read" in refusal("nosuchscheme://x")


def test_the_same_id_in_two_files_is_refused(tmp_path):
    write_lines(tmp_path / "a.jsonl", {"id": "x", "text": "one"})
    write_lines(tmp_path / "b.jsonl", {"id": "x", "text": "two"})
    assert refusal(tmp_path) == "corpus b.jsonl:1: id 'x' stands twice"


def test_rows_are_read_one_at_a_time(tmp_path):
    path = write_lines(tmp_path / "d.jsonl", {"id": "a", "text": "x"}, "broken")
    documents = read_documents(CorpusSpec(source=str(path)))
    assert next(documents).id == "a"


def test_the_digest_changes_with_content_order_id_and_domain():
    a, b = Document(id="a", text="x"), Document(id="b", text="y")
    variants = [[a, b], [b, a], [a], [Document(id="a", text="x", domain="d"), b], [Document(id="a", text="z"), b]]
    assert len({corpus_digest(variant) for variant in variants}) == len(variants)
    assert corpus_digest([a, b]) == corpus_digest(iter([a, b]))


def test_split_of_gives_the_asked_share_and_moves_no_document_back():
    ids = [f"doc-{n}" for n in range(4000)]
    tenth = {i for i in ids if split_of(i, 0.1, 0) == "held_out"}
    fifth = {i for i in ids if split_of(i, 0.2, 0) == "held_out"}
    assert 340 < len(tenth) < 460
    assert tenth < fifth
    assert tenth != {i for i in ids if split_of(i, 0.1, 1) == "held_out"}


@given(
    st.lists(st.text(min_size=1), min_size=2, unique=True, max_size=12),
    st.floats(0.001, 0.999),
    st.integers(0, 3),
    st.randoms(),
)
def test_both_sides_have_a_document_whatever_the_order(ids, held_out, seed, random):
    side = Splitter(ids, held_out, seed)
    sides = {i: side(i) for i in ids}
    assert set(sides.values()) == {"train", "held_out"}
    shuffled = random.sample(ids, len(ids))
    again = Splitter(shuffled, held_out, seed)
    assert {i: again(i) for i in ids} == sides


def test_a_single_document_is_for_training():
    assert {Splitter([f"d{n}"], 0.9, 0)(f"d{n}") for n in range(20)} == {"train"}


def test_nothing_and_all_held_out():
    ids = [f"d{n}" for n in range(20)]
    assert {Splitter(ids, 0.0, 0)(i) for i in ids} == {"train"}
    assert {Splitter(ids, 1.0, 0)(i) for i in ids} == {"held_out"}


def test_ids_are_looked_at_only_until_both_sides_have_one():
    looked_at = []

    def ids():
        for n in range(10_000):
            looked_at.append(n)
            yield f"d{n}"

    Splitter(ids(), 0.5, 0)
    assert len(looked_at) < 50
