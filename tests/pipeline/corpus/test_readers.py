import json

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus.readers import deduplicated, read_rows
from pipeline.errors import CorpusError


def read(path):
    return [row for _, row in read_rows(str(path))]


def refusal(path):
    with pytest.raises(CorpusError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_text_that_repeats_longer_ones_is_left_out():
    first, second, third = (f"paragraph {n} is long enough to count as one of its own, surely" for n in "abc")
    texts = {"whole": f"{first}\n\n{second}", "part": second, "wrapped": second.replace(" ", "\n"), "new": third}
    assert sorted(deduplicated(texts)) == ["new", "whole"]


def test_no_python_topic_repeats_another():
    texts = {row["id"]: row["text"] for row in read("python-docs")}
    assert sorted(deduplicated(texts)) == sorted(texts)
    assert "python-docs/compound" in texts
    assert "python-docs/while" not in texts


def test_the_python_reference_is_part_of_python():
    rows = read("python-docs")
    assert len(rows) > 50
    assert rows[0]["id"].startswith("python-docs/")
    assert {row["domain"] for row in rows} == {"python-docs"}
    assert sum(len(row["text"]) for row in rows) > 300_000
    assert rows == read("python-docs")


def test_a_text_file_is_one_row_named_after_it(tmp_path):
    (tmp_path / "note.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\0three")
    assert read(tmp_path / "note.txt") == [{"id": "note.txt", "text": "one\r\ntwo\0three"}]


def test_json_lines_have_an_id_by_default_and_keep_all_fields(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"id": "a", "text": "hello", "score": 3}\n\n{"text": "without id"}\n')
    assert list(read_rows(str(tmp_path / "d.jsonl"))) == [
        ("d.jsonl:1", {"id": "a", "text": "hello", "score": 3}),
        ("d.jsonl:3", {"id": "d.jsonl:3", "text": "without id"}),
    ]


def test_parquet_rows_omit_nulls_and_have_an_id_by_default(tmp_path):
    rows = [{"id": "a", "text": "hello", "domain": None}, {"id": None, "text": "there", "domain": "x"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert list(read_rows(str(tmp_path / "d.parquet"))) == [
        ("d.parquet row 1", {"id": "a", "text": "hello"}),
        ("d.parquet row 2", {"id": "d.parquet:2", "text": "there", "domain": "x"}),
    ]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "sub" / "a.txt").write_text("a")
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "first", "text": "x"}))
    (tmp_path / "README.md").write_text("skipped")
    (tmp_path / ".hidden.txt").write_text("skipped")
    assert [row["id"] for row in read(tmp_path)] == ["first", "b.txt", "sub/a.txt"]


def test_any_fsspec_filesystem_is_read():
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/corpus-test/a.txt", b"text")
    assert [row["id"] for row in read("memory://corpus-test")] == ["a.txt"]
    memory.rm("/corpus-test", recursive=True)


@pytest.mark.parametrize(
    ("line", "words"), [("{", "not JSON"), ("[" * 100_000, "not JSON"), ("[1]", "expected an object, got list")]
)
def test_a_line_that_is_no_json_object_is_refused_with_file_and_line(tmp_path, line, words):
    (tmp_path / "d.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    message = refusal(tmp_path / "d.jsonl")
    assert message.startswith("corpus d.jsonl:2: ")
    assert words in message


def test_invalid_utf8_is_refused_with_its_line(tmp_path):
    (tmp_path / "d.txt").write_bytes(b"one\ntwo\nth\xffree")
    assert refusal(tmp_path / "d.txt") == "corpus d.txt:3: expected UTF-8, got byte 0xff"
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert refusal(tmp_path / "d.jsonl") == "corpus d.jsonl:2: expected UTF-8, got byte 0xff"


def test_a_file_that_is_not_parquet_is_refused(tmp_path):
    (tmp_path / "d.parquet").write_bytes(b"PAR1 nothing here PAR1")
    assert "not a readable Parquet file" in refusal(tmp_path / "d.parquet")


def test_a_missing_or_unsupported_source_is_refused(tmp_path):
    assert "no such file or folder" in refusal(tmp_path / "missing")
    (tmp_path / "data.csv").write_text("a,b")
    assert "expected a folder or a file of .jsonl, .parquet, .txt" in refusal(tmp_path / "data.csv")
    assert "cannot be read" in refusal("nosuchscheme://x")


def test_rows_are_read_one_at_a_time(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"id": "a", "text": "x"}\nbroken\n')
    assert next(read_rows(str(tmp_path / "d.jsonl")))[1]["id"] == "a"
