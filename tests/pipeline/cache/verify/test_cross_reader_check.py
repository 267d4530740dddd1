"""fastparquet as the second reader of every shard."""

import re
import tomllib
from pathlib import Path

import fastparquet

from pipeline.cache.verify.verify_cache import verify_cache
from pipeline.errors import ExitCode

ROOT = Path(__file__).parents[4]


def problems(store):
    return [finding for finding in verify_cache(store).findings if finding.severity != "note"]


def test_a_value_that_fastparquet_reads_differently_is_a_finding(make_cache, monkeypatch):
    store = make_cache()
    to_pandas = fastparquet.ParquetFile.to_pandas

    def change_entropy(self, *arguments, **options):
        frame = to_pandas(self, *arguments, **options)
        if len(frame) > 1:
            frame.at[1, "entropy"] = b"\0" + frame.at[1, "entropy"][1:]
        return frame

    monkeypatch.setattr(fastparquet.ParquetFile, "to_pandas", change_entropy)
    findings = problems(store)
    assert {(f.kind, f.row_group, f.row) for f in findings} == {("reader_mismatch", 0, 1)}
    assert findings[0].message == "column entropy: fastparquet and pyarrow read different values"


def test_a_list_that_fastparquet_reads_as_null_is_a_finding(make_cache, monkeypatch):
    store = make_cache()
    to_pandas = fastparquet.ParquetFile.to_pandas

    def drop_ids(self, *arguments, **options):
        frame = to_pandas(self, *arguments, **options)
        frame.at[0, "input_ids"] = None
        return frame

    monkeypatch.setattr(fastparquet.ParquetFile, "to_pandas", drop_ids)
    findings = problems(store)
    assert {(f.kind, f.row) for f in findings} == {("reader_mismatch", 0)}
    assert findings[0].message == "column input_ids: fastparquet and pyarrow read different values"


def test_a_failure_of_fastparquet_is_a_finding(make_cache, monkeypatch):
    store = make_cache()

    def fail(self, *arguments, **options):
        raise RuntimeError("cannot")

    monkeypatch.setattr("fastparquet.ParquetFile.to_pandas", fail)
    assert {f.message for f in problems(store)} == {"fastparquet cannot read it: RuntimeError: cannot"}


def test_without_fastparquet_verify_adds_a_note_and_runs_all_other_checks(make_cache, monkeypatch):
    store = make_cache()
    monkeypatch.setattr("pipeline.cache.verify.verify_cache.fastparquet_installed", lambda: False)
    report = verify_cache(store)
    assert [f.kind for f in report.findings] == ["not_cross_checked"]
    assert "pip install 'stillhouse[verify]'" in report.findings[0].message
    assert (report.exit_code, report.cross_checked) == (ExitCode.DONE, False)


def test_only_the_cross_reader_check_imports_fastparquet():
    modules = [path for package in ("pipeline", "actors", "student") for path in (ROOT / package).rglob("*.py")]
    assert len(modules) > 50
    importing = [path.name for path in modules if re.search(r"^\s*(import|from) fastparquet", path.read_text(), re.M)]
    assert importing == ["cross_reader_check.py"]
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not any("fastparquet" in name for name in declared["dependencies"])
    assert any("fastparquet" in name for name in declared["optional-dependencies"]["verify"])
