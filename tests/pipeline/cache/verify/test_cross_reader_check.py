"""fastparquet as the second reader of every shard, and of nothing else."""

import re
import tomllib
from pathlib import Path

import fastparquet

from pipeline.cache.verify import cross_reader_check
from pipeline.cache.verify.verify_cache import verify_cache
from pipeline.errors import ExitCode

ROOT = Path(__file__).parents[4]


def found(store):
    return [finding for finding in verify_cache(store).findings if finding.weight != "note"]


def test_the_second_reader_must_agree_value_for_value(make_cache, monkeypatch):
    store = make_cache()
    honest = fastparquet.ParquetFile.to_pandas

    def dishonest(self, *arguments, **named):
        frame = honest(self, *arguments, **named)
        if len(frame) > 1:
            frame.at[1, "entropy"] = b"\0" + frame.at[1, "entropy"][1:]
        return frame

    monkeypatch.setattr(fastparquet.ParquetFile, "to_pandas", dishonest)
    findings = found(store)
    assert {(f.kind, f.row_group, f.row) for f in findings} == {("disagreement", 0, 1)}
    assert findings[0].message == "column entropy: fastparquet and pyarrow read different values"


def test_a_list_that_only_one_reader_sees_is_a_disagreement(make_cache, monkeypatch):
    store = make_cache()
    honest = fastparquet.ParquetFile.to_pandas

    def blind(self, *arguments, **named):
        frame = honest(self, *arguments, **named)
        frame.at[0, "input_ids"] = None
        return frame

    monkeypatch.setattr(fastparquet.ParquetFile, "to_pandas", blind)
    findings = found(store)
    assert {(f.kind, f.row) for f in findings} == {("disagreement", 0)}
    assert findings[0].message == "column input_ids: fastparquet and pyarrow read different values"


def test_a_second_reader_that_fails_disagrees(make_cache, monkeypatch):
    store = make_cache()

    def fail(self, *arguments, **named):
        raise RuntimeError("cannot")

    monkeypatch.setattr("fastparquet.ParquetFile.to_pandas", fail)
    assert {f.message for f in found(store)} == {"fastparquet cannot read it: RuntimeError: cannot"}


def test_without_the_second_reader_verify_says_so_and_does_the_rest(make_cache, monkeypatch):
    store = make_cache()
    monkeypatch.setattr(cross_reader_check, "installed", lambda: False)
    report = verify_cache(store)
    assert [f.kind for f in report.findings] == ["unwitnessed"]
    assert "pip install 'stillhouse[verify]'" in report.findings[0].message
    assert (report.exit_code, report.witnessed) == (ExitCode.DONE, False)


def test_nothing_else_depends_on_the_second_reader():
    rooms = [path for package in ("pipeline", "actors", "student") for path in (ROOT / package).rglob("*.py")]
    assert len(rooms) > 50
    importing = [path.name for path in rooms if re.search(r"^\s*(import|from) fastparquet", path.read_text(), re.M)]
    assert importing == ["witness.py"]
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not any("fastparquet" in name for name in declared["dependencies"])
    assert any("fastparquet" in name for name in declared["optional-dependencies"]["verify"])
