"""Files that no commit names: missing, damaged, foreign and unknown ones are reported."""

import errno
from dataclasses import replace

import numpy as np
import pytest

from pipeline.cache.commit import read_commit
from pipeline.cache.lm_head import write_lm_head
from pipeline.cache.manifest import read_manifest, write_manifest
from pipeline.cache.quarantine import record
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage import layout
from pipeline.cache.storage.local import LocalFolder
from pipeline.cache.unit_list import UnitList
from pipeline.cache.verify.verify_cache import verify_cache
from pipeline.contracts import LmHead
from pipeline.errors import ExitCode
from pipeline.identity import sha256_bytes


def findings_of(store):
    return {(finding.kind, finding.severity, finding.shard) for finding in verify_cache(store).findings}


SIDECARS = [(layout.TEACHER_JSON, "identity"), (layout.LM_HEAD, "lm_head")]


@pytest.mark.parametrize("path", layout.SIDECARS)
def test_the_manifest_holds_the_sha256_of_the_sidecars(make_cache, path):
    store = make_cache()
    assert read_manifest(store).sidecar_sha256[path] == sha256_bytes(store.read(path))


@pytest.mark.parametrize(("path", "kind"), SIDECARS)
def test_a_missing_sidecar_is_damage(make_cache, path, kind):
    store = make_cache()
    store.delete(path)
    assert (kind, "damage", path) in findings_of(store)
    assert verify_cache(store).exit_code == ExitCode.FAILED


@pytest.mark.parametrize(("path", "kind"), SIDECARS)
def test_a_flipped_bit_in_a_sidecar_is_damage(make_cache, path, kind):
    store = make_cache(documents=2)
    data = store.read(path)
    for position in range(0, len(data), max(1, len(data) // 12)):
        store.put(path, data[:position] + bytes([data[position] ^ 2]) + data[position + 1 :])
        assert kind in {kind for kind, _, _ in findings_of(store)}, position
    store.put(path, data)
    assert findings_of(store) == set()


def test_the_teacher_and_head_of_another_cache_are_damage(make_cache):
    store, other = make_cache(), make_cache("other", options={"seed": 5, "layers": 5})
    for path, kind in SIDECARS:
        original = store.read(path)
        store.put(path, other.read(path))
        assert (kind, "damage", path) in findings_of(store)
        store.put(path, original)


def test_a_missing_teacher_is_damage_even_without_a_manifest(make_cache):
    store = make_cache()
    store.delete(layout.MANIFEST_JSON)
    store.delete(layout.TEACHER_JSON)
    assert ("identity", "damage", layout.TEACHER_JSON) in findings_of(store)


def test_a_manifest_without_the_teacher_is_damage(make_cache):
    store = make_cache()
    manifest = read_manifest(store)
    store.put(layout.MANIFEST_JSON, replace(manifest, sidecar_sha256={}).to_bytes())
    assert findings_of(store) == {("manifest", "damage", layout.MANIFEST_JSON)}


def test_a_head_of_another_vocabulary_is_damage(make_cache):
    store = make_cache()
    store.delete(layout.LM_HEAD)
    write_lm_head(store, LmHead(np.zeros((513, 32), np.uint16)))
    write_manifest(store)
    assert findings_of(store) == {("lm_head", "damage", layout.LM_HEAD)}


@pytest.mark.parametrize(
    "path",
    [
        "notes.txt",
        "cache.json.bak",
        "units/00001.parquet",
        "units/index.json",
        "tokenizer/secret.txt",
        "tokenizer/deeper/tokenizer.json",
        "quarantine/unknown.json",
        "generated/00000.jsonl",
        "elsewhere/x",
        "data/x",
    ],
)
def test_an_unknown_file_is_reported_in_every_folder(make_cache, path):
    store = make_cache()
    if path.startswith("quarantine/"):
        record(store, "unknown", "train-00000", "reason", "")
    else:
        store.put(path, b"something")
    assert findings_of(store) == {("unlisted", "note", path)}
    assert verify_cache(store).exit_code == ExitCode.DONE


def test_an_extra_file_among_the_commits_is_damage(make_cache):
    store = make_cache()
    store.put("commits/x.json", b"{}")
    assert findings_of(store) == {("commit", "damage", "commits/x.json")}


def test_files_of_an_interrupted_capture_are_not_reported(make_cache):
    name = UnitList.open(make_cache("first")).read("train-00001").sequences[0].sequence_id
    store = make_cache()
    record(store, name, "train-00001", "an attempt that died could not", "")
    store.put(layout.answers_path(3, "0123456789abcdef" * 4), b'{"id": "x"}\n')
    assert findings_of(store) == set()


def unreadable(monkeypatch, path):
    """Let every read of that file fail with EIO."""
    read = LocalFolder.read

    def fail(folder, read_path):
        if read_path == path:
            raise OSError(errno.EIO, "Input/output error")
        return read(folder, read_path)

    monkeypatch.setattr(LocalFolder, "read", fail)


@pytest.mark.parametrize(
    "path",
    [
        "the shard",
        layout.TEACHER_JSON,
        layout.MANIFEST_JSON,
        layout.LM_HEAD,
        layout.UNIT_INDEX,
        layout.unit_file_path(0),
        layout.FAITHFULNESS_JSON,
        layout.commit_path("train-00000"),
        "tokenizer/tokenizer.json",
    ],
)
def test_an_unreadable_file_is_reported_and_the_rest_is_checked(make_cache, monkeypatch, path):
    store = make_cache()
    path = read_commit(store, "train-00000").file if path == "the shard" else path
    undamaged = verify_cache(store)
    store.put("notes.txt", b"unknown file")
    unreadable(monkeypatch, path)
    report = verify_cache(store)
    (finding, *_) = [finding for finding in report.findings if finding.kind == "unreadable"]
    assert "Input/output error (errno 5 EIO)" in finding.message
    assert path in str(finding)
    assert ("unlisted", "note", "notes.txt") in findings_of(store)
    assert report.shards >= undamaged.shards - 1
    assert report.exit_code == ExitCode.FAILED


def test_an_audit_without_audited_sequences_is_a_note(make_cache):
    store = make_cache(audit=0.0, corpus={"held_out": 0.0})
    report = verify_cache(store, audit=True)
    assert [(f.kind, f.severity) for f in report.findings] == [("unaudited", "note")]
    assert "has no audited sequence; set capture.audit above 0" in report.findings[0].message
    assert (report.exit_code, report.audit) == (ExitCode.DONE, None)
    assert "is complete and undamaged" in str(report)


def test_an_audit_of_a_damaged_cache_says_that_it_was_not_made(make_cache):
    store = make_cache()
    store.put(CacheReader.open(store).commit("train-00000").file, b"")
    report = verify_cache(store, audit=True)
    assert ("unaudited", "a damaged cache is not audited") in {(f.kind, f.message) for f in report.findings}
    assert report.exit_code == ExitCode.FAILED
