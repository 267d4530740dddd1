import io
import json
import math
import shutil
import sys
from dataclasses import replace

import pytest

from pipeline.cache.commit import commit_unit, committed_units, read_commit
from pipeline.cache.format.shard_writer import encode_shard
from pipeline.cache.manifest import write_manifest
from pipeline.cache.quarantine import record
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage import layout
from pipeline.cache.storage.store import Store
from pipeline.cache.unit_list import UnitList
from pipeline.cache.verify.findings import KINDS, REPAIR, SHOWN
from pipeline.cache.verify.verify_cache import verify_cache
from pipeline.errors import ExitCode, StorageError
from pipeline.identity import canonical_json, sha256_bytes
from pipeline.run.cli import main


def problems(store, *, notes=False):
    report = verify_cache(store)
    return [f for f in report.findings if notes or f.severity != "note"]


def kinds(store):
    return {finding.kind for finding in problems(store)}


def shard_path(store, unit_id="train-00000"):
    return read_commit(store, unit_id).file


def recommit(store, unit_id, data):
    """Write a shard with a matching commit, so that only its content is wrong."""
    old = read_commit(store, unit_id)
    sha256 = sha256_bytes(data)
    new = replace(old, sha256=sha256, bytes=len(data), file=layout.shard_path(unit_id, sha256))
    store.delete(old.file)
    store.put(new.file, data)
    store.put(layout.commit_path(unit_id), canonical_json(new.record()).encode())
    store.delete(layout.MANIFEST_JSON)


# ---- complete caches ----


@pytest.mark.parametrize(
    "capture",
    [
        {"mode": "topk", "hidden_layers": [0, -1], "temperatures": [1.0, 2.0], "any_temperature": True},
        {"mode": "topp", "top_p": 0.5, "min_k": 2},
        {"mode": "unbiased", "boundary": True},
        {"mode": "sampled", "draws": 20, "hidden_layers": [1], "hidden_codec": "int8"},
    ],
)
def test_an_undamaged_cache_has_no_findings(make_cache, capture):
    report = verify_cache(make_cache(**capture))
    assert report.findings == ()
    assert (report.exit_code, report.complete, report.cross_checked) == (ExitCode.DONE, True, True)
    assert report.shards == report.units > 1
    shown = str(report).splitlines()
    assert shown[0] == f"cache {report.cache} is complete and undamaged"
    assert f"{report.shards} of {report.units} shards, {report.rows} rows, " in shown[1]
    assert "by pyarrow and fastparquet, which agree value for value" in shown[1]
    assert shown[-1] == "  faithful  live against cache 1.00e-04 nats, within 7.00e-04"


def test_a_store_without_cache_is_refused(tmp_path):
    with pytest.raises(StorageError, match="expected a cache"):
        verify_cache(tmp_path)


def test_progress_is_reported_per_shard(make_cache):
    calls = []
    store = make_cache()
    verify_cache(store, progress=lambda done, total: calls.append((done, total)))
    shards = len(committed_units(store))
    assert calls == [(n, shards) for n in range(shards + 1)]


def test_the_command_shows_a_bar_on_a_terminal_and_nothing_elsewhere(make_cache, monkeypatch, capsys):
    store = make_cache()
    for is_terminal in (True, False):
        stderr = io.StringIO()
        monkeypatch.setattr(stderr, "isatty", lambda answer=is_terminal: answer)
        monkeypatch.setattr(sys, "stderr", stderr)
        assert main(["verify", store.uri, "--json"]) == ExitCode.DONE
        assert ("verify" in stderr.getvalue()) == is_terminal
        assert json.loads(capsys.readouterr().out)["complete"]


def test_units_that_were_not_captured_make_it_incomplete(make_cache):
    store = make_cache(units=["train-00000"])
    report = verify_cache(store)
    assert {finding.kind for finding in report.findings} == {"uncommitted"}
    assert report.exit_code == ExitCode.INCOMPLETE
    assert f"cache {store.uri} is undamaged but incomplete" in str(report).splitlines()
    assert "incomplete uncommitted: train-00001; run: stillhouse capture" in str(report).splitlines()
    assert REPAIR not in str(report)


def test_a_quarantined_row_makes_it_incomplete_with_its_reason(make_cache):
    name = UnitList.open(make_cache("unit_list")).read("train-00000").sequences[1].sequence_id
    store = make_cache(quarantined={name})
    record(store, name, "train-00000", "the engine refused it", "")
    (finding,) = problems(store)
    assert (finding.kind, finding.message) == ("quarantined", f"{name}: the engine refused it")
    assert verify_cache(store).exit_code == ExitCode.INCOMPLETE


def test_a_missing_manifest_makes_it_incomplete(make_cache):
    store = make_cache()
    store.delete(layout.MANIFEST_JSON)
    assert kinds(store) == {"no_manifest"}


def test_damage_takes_precedence_over_incompleteness(make_cache):
    store = make_cache(units=["train-00000", "train-00001"])
    store.delete(shard_path(store))
    report = verify_cache(store)
    assert {f.kind for f in report.findings} == {"uncommitted", "missing"}
    assert report.exit_code == ExitCode.FAILED


def test_the_report_is_json(make_cache):
    store = make_cache()
    store.delete(shard_path(store))
    report = json.loads(json.dumps(verify_cache(store).as_json()))
    assert (report["exit_code"], report["damaged"], report["complete"]) == (1, True, True)
    assert report["findings"][0]["kind"] == "missing"
    assert report["findings"][0]["shard"] == shard_path(store)


def at(live_vs_cache):
    """One distance as in faithfulness.json."""
    return {"kl_nats": {"live_vs_cache": live_vs_cache, "live_vs_live": 1e-4, "codec": 1e-4, "allowed": 7e-4}}


def with_verdict(store, **changes):
    """The same cache with a changed faithfulness.json."""
    verdict = json.loads(store.read(layout.FAITHFULNESS_JSON))
    store.put(layout.FAITHFULNESS_JSON, json.dumps(verdict | changes).encode())
    return store


def test_an_unfaithful_cache_fails_and_is_still_audited(make_cache):
    why = "live against cache 2.00e+00 nats, further from the teacher than 7.00e-04"
    store = with_verdict(make_cache(), usable=False, distances=at(2.0), why=why)
    report = verify_cache(store, audit=True)
    assert [(f.kind, f.severity, f.message) for f in report.findings] == [("unfaithful", "unfaithful", why)]
    assert (report.exit_code, report.damaged) == (ExitCode.FAILED, False)
    assert f"cache {store.uri} is complete and undamaged, but not faithful to its teacher" in str(report)
    assert report.as_json()["faithful"] is False
    assert report.audit is not None


def test_a_cache_that_was_not_compared_with_its_teacher_has_a_note(make_cache):
    store = make_cache()
    store.delete(layout.FAITHFULNESS_JSON)
    report = verify_cache(store)
    assert [(f.kind, f.severity) for f in report.findings] == [("not_compared", "note")]
    assert (report.exit_code, report.as_json()["faithful"]) == (ExitCode.DONE, None)
    assert "  faithful  not compared with the live teacher" in str(report)


@pytest.mark.parametrize(
    "changes",
    [{"usable": "yes"}, {"positions": None}, {"distances": {}}, {"distances": at(1.0)}, {"distances": at(math.nan)}],
)
def test_an_edited_faithfulness_record_is_reported(make_cache, changes):
    assert kinds(with_verdict(make_cache(), **changes)) == {"faithfulness"}


def test_a_faithfulness_record_that_is_no_json_is_reported(make_cache):
    store = make_cache()
    store.put(layout.FAITHFULNESS_JSON, b"[]")
    assert kinds(store) == {"faithfulness"}
    store.put(layout.FAITHFULNESS_JSON, b"{")
    assert kinds(store) == {"faithfulness"}


def test_a_terminal_shows_the_first_findings_of_a_kind(make_cache):
    report = verify_cache(make_cache(documents=30, units=["train-00000"]))
    assert len(report.findings) > SHOWN
    shown = str(report).splitlines()
    assert len([line for line in shown if line.startswith("incomplete uncommitted: train")]) < len(report.findings)
    assert f"incomplete uncommitted: {len(report.findings) - SHOWN} more like these; --json lists all" in shown
    assert len(report.as_json()["findings"]) == len(report.findings)


# ---- shard files ----


def test_two_swapped_shards_are_reported(make_cache):
    store = make_cache()
    a, b = shard_path(store, "train-00000"), shard_path(store, "train-00001")
    first, second = store.read(a), store.read(b)
    store.put(a, second)
    store.put(b, first)
    assert [(f.kind, f.shard, f.message) for f in problems(store)] == [
        ("swapped", a, "file holds the shard of unit train-00001"),
        ("swapped", b, "file holds the shard of unit train-00000"),
    ]


def test_a_damaged_unit_can_be_captured_anew(make_cache):
    store = make_cache()
    shard = shard_path(store)
    original, rows = store.read(shard), CacheReader.open(store).read_unit("train-00000")
    store.put(shard, original[:-1] + b"x")
    assert REPAIR in str(verify_cache(store)).splitlines()
    store.delete(layout.commit_path("train-00000"))
    commit_unit(store, "train-00000", encode_shard(rows, CacheReader.open(store).spec), rows)
    write_manifest(store)
    assert verify_cache(store).findings == ()
    assert store.read(shard) == original


def test_a_renamed_shard_is_reported(make_cache):
    store = make_cache()
    old = shard_path(store)
    store.put("data/other.parquet", store.read(old))
    store.delete(old)
    (finding,) = problems(store, notes=True)
    assert (finding.kind, finding.shard) == ("renamed", old)
    assert "data/other.parquet" in finding.message


def test_a_missing_shard_is_reported(make_cache):
    store = make_cache()
    store.put("data/other.parquet", b"something else")
    store.delete(shard_path(store))
    assert [f.kind for f in problems(store, notes=True)] == ["missing", "unlisted"]


def test_an_unlisted_extra_file_is_a_note(make_cache):
    store = make_cache()
    store.put("data/train-00000-0123456789abcdef.parquet", store.read(shard_path(store)))
    report = verify_cache(store)
    assert [(f.kind, f.shard) for f in report.findings] == [("unlisted", "data/train-00000-0123456789abcdef.parquet")]
    assert report.exit_code == ExitCode.DONE


def test_a_shard_of_another_run_is_reported(make_cache):
    store, other = make_cache("run"), make_cache("other", options={"seed": 5})
    store.put(shard_path(store), other.read(shard_path(other)))
    assert kinds(store) == {"sha256"}
    recommit(store, "train-00000", make_cache("third", k=9).read(shard_path(make_cache("third", k=9))))
    assert kinds(store) == {"schema", "no_manifest"}


def test_rows_that_are_not_in_the_unit_list_are_foreign(make_cache):
    store, elsewhere = make_cache(), make_cache("elsewhere", prefix="other")
    recommit(store, "train-00000", elsewhere.read(shard_path(elsewhere)))
    (finding,) = (f for f in problems(store) if f.kind == "foreign")
    assert finding.message.startswith("4 of 4 rows are not in the unit list, such as 'other-")


def test_page_checksums_locate_the_row_group_of_a_flipped_bit(make_cache):
    store = make_cache(row_group_per_row=True)
    path = shard_path(store)
    data = bytearray(store.read(path))
    import io

    import pyarrow.parquet as pq

    column = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(2).column(6)
    data[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    store.put(path, bytes(data))
    assert {(f.kind, f.row_group) for f in problems(store)} == {("sha256", None), ("page", 2)}


# ---- all other files ----


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (layout.CACHE_JSON, "identity"),
        (layout.UNIT_INDEX, "unit_list"),
        (layout.unit_file_path(0), "unit_list"),
        (layout.MANIFEST_JSON, "manifest"),
        (layout.LM_HEAD, "lm_head"),
        ("tokenizer/tokenizer.json", "tokenizer"),
    ],
)
def test_damage_of_other_files_is_reported(make_cache, path, kind):
    store = make_cache(units=[])
    data = store.read(path)
    copies = [data[: len(data) // 2], b""]
    copies += [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(3, len(data), max(1, len(data) // 5))]
    for copy in copies:
        store.put(path, copy)
        assert kind in kinds(store)
    store.put(path, data)
    assert kinds(store) == {"uncommitted"}


@pytest.mark.parametrize("copy", [b"", b"{", b"[1]", b"\xff"])
def test_a_damaged_commit_or_teacher_is_reported(make_cache, copy):
    store = make_cache(units=["train-00000"])
    store.put(layout.commit_path("train-00000"), copy)
    assert {"commit", "manifest"} <= kinds(store)
    store.put(layout.TEACHER_JSON, copy)
    assert "identity" in kinds(store)


@pytest.mark.parametrize("edit", [(b'"k":8', b'"k":7'), (b'"vocabulary":512', b'"vocabulary":513')])
def test_a_teacher_that_disagrees_with_identity_or_shards_is_reported(make_cache, edit):
    store = make_cache(units=["train-00000"])
    store.put(layout.TEACHER_JSON, store.read(layout.TEACHER_JSON).replace(*edit))
    assert kinds(store) & {"identity", "schema"}
    assert verify_cache(store).exit_code == ExitCode.FAILED


def test_a_commit_with_a_wrong_field_disagrees_with_the_manifest_or_its_shard(make_cache):
    store = make_cache(units=["train-00000"])
    path = layout.commit_path("train-00000")
    store.put(path, store.read(path).replace(b'"rows":4', b'"rows":3'))
    assert "manifest" in kinds(store)
    store.delete(layout.MANIFEST_JSON)
    assert "commit" in kinds(store)


def test_a_missing_unit_list_is_reported(make_cache):
    store = make_cache()
    store.delete(layout.UNIT_INDEX)
    assert kinds(store) == {"unit_list"}


def test_a_missing_commit_of_the_manifest_is_damage(make_cache):
    store = make_cache()
    store.delete(layout.commit_path("train-00001"))
    assert {"manifest", "uncommitted"} <= kinds(store)


def test_a_renamed_commit_is_reported(make_cache):
    store = make_cache()
    store.put("commits/train-00077.json", store.read(layout.commit_path("train-00000")))
    assert kinds(store) == {"commit"}


def test_a_manifest_of_another_cache_is_reported(make_cache):
    store, other = make_cache(), make_cache("other", k=9)
    store.put(layout.MANIFEST_JSON, other.read(layout.MANIFEST_JSON))
    assert kinds(store) == {"manifest"}


def test_every_kind_of_finding_has_a_severity_and_a_meaning():
    assert {severity for severity, _ in KINDS.values()} == {"damage", "unfaithful", "incomplete", "note"}
    assert all(meaning for _, meaning in KINDS.values())


def test_a_cache_verifies_in_an_object_store_too(make_cache):
    import fsspec

    store = make_cache()
    memory = fsspec.filesystem("memory")
    for path in store.list():
        memory.pipe_file(f"/verify-test/{path}", store.read(path))
    assert verify_cache(Store.open("memory://verify-test")).findings == ()
    memory.rm("/verify-test", recursive=True)
    shutil.rmtree(store.local_path())
