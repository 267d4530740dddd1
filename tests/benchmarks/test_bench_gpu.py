"""The GPU benchmark on a CPU: every part at tiny sizes, the report of their records, and the wheels."""

import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent
SCRIPT = BENCHMARKS / "bench_gpu.py"
MAX_SECONDS = 480
MEASURED_VARIANTS = {
    "device": {"bandwidth", "matrix product"},
    "reduction": {"fused", "eager", "topk + logsumexp", "fused: best ids", "fused: sums"},
    "capture": {"bare prefill", "score", "capture", "step: reduction", "step: encoding"},
    "head": {"ce", "dense", "chunked"},
    "training": {"kd", "ce"},
    "compiled": {"kd", "first two steps"},
    "decode": {"decode", "to the device, pageable", "to the device, pinned", "copy only, pinned"},
}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_gpu")


@pytest.fixture
def wheels(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu.wheels")


def bench_gpu(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def tiny_records(tmp_path_factory):
    """All parts in one process, which imports torch and transformers once."""
    folder = tmp_path_factory.mktemp("bench-gpu")
    pytest.importorskip("triton", reason="triton is not installed: pip install --no-deps triton==3.7.1")
    done = bench_gpu(
        "--tiny", "--records", str(folder / "records.jsonl"),
        "--part", "device", "tests", "reduction", "capture", "head", "liger", "training", "compiled", "decode",
        TRITON_INTERPRET="1", TORCHINDUCTOR_CACHE_DIR=str(folder / "torch"), OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_part_measures_all_its_variants_on_a_cpu(tiny_records):
    assert [record for record in tiny_records if record["kind"] == "failure"] == []
    figures = [record for record in tiny_records if record["kind"] == "figure"]
    for part, variants in MEASURED_VARIANTS.items():
        assert variants <= {record["variant"] for record in figures if record["part"] == part}, part
    assert all(record["ms"] is None or record["ms"] > 0 for record in figures)
    cases = {record["case"].split(", ")[-1] for record in figures if record["part"] == "training"}
    assert cases == {"one device", "FSDP2 on one rank"}


@pytest.mark.slow
def test_the_outcomes_of_the_tests_that_need_a_gpu_are_recorded(tiny_records):
    outcomes = {
        record["name"].split("::")[-1]: record["outcome"] for record in tiny_records if record["kind"] == "test"
    }
    gpu_only = {name for name in outcomes if "agree_on_a_gpu" in name}
    assert len(gpu_only) == 6
    assert {outcomes[name] for name in gpu_only} == {"skipped"}
    assert {outcomes[name] for name in outcomes.keys() - gpu_only} == {"passed"}


@pytest.mark.slow
def test_numerical_goals_are_met_in_the_interpreter(tiny_records, bench):
    goals = [record for record in tiny_records if record["kind"] == "goal" and record["is_numerical"]]
    assert len(goals) >= 12
    assert [goal for goal in goals if not bench.is_met(goal)] == []


def test_the_time_limits_add_up_to_less_than_eight_minutes(bench):
    assert sum(part.limit_s for part in bench.PARTS.values()) < MAX_SECONDS


def test_a_part_that_is_killed_at_its_limit_does_not_stop_the_others(bench, monkeypatch, tmp_path):
    monkeypatch.setitem(bench.PARTS, "training", bench.Part("gpu.training", 0.01))
    monkeypatch.setitem(bench.PARTS, "unknown", bench.Part("gpu.unknown", 60))  # not known to the process of the part
    out = tmp_path / "build" / "bench-gpu.json"
    found = bench.measure(bench._arguments(["--tiny", "--out", str(out), "--parts", "training", "unknown", "device"]))
    assert json.loads(out.read_text()) == found
    assert found["parts"]["training"]["state"] == "killed at its limit of 0.04 s"
    assert found["parts"]["unknown"]["state"].startswith("failed with exit code 2: ")
    assert found["parts"]["device"]["state"] == "done"
    assert {record["part"] for record in found["records"]} == {"device"}
    assert not bench.is_success(found)
    text = bench.report(found)
    assert "- training: killed at its limit" in text
    assert "Tiny sizes on a CPU" in text


def test_an_incomplete_last_record_is_left_out(bench, tmp_path):
    records = bench.Records(tmp_path / "records.jsonl", "decode")
    records.figure("case", "variant", ms=1.0)
    with records.catch_failure("another case"):
        raise RuntimeError("out of memory")
    with records.path.open("a") as file:
        file.write('{"kind": "fig')
    figure, failure = bench.read_records(records.path)
    assert (figure["variant"], figure["ms"]) == ("variant", 1.0)
    assert failure["message"] == "RuntimeError: out of memory"


def found_with(*records, sizes="full", state="done", **about):
    about = {"date": "2026-01-01", "device": "a GPU", "commit": "abc", "sizes": sizes, **about}
    return {"about": about, "parts": {"head": {"state": state}}, "records": list(records)}


def goal(value, **more):
    more = {"at_least": None, "at_most": None, "is_numerical": False, "note": None, **more}
    return {"kind": "goal", "part": "head", "case": "V=10", "quantity": "memory", "value": value, **more}


def test_goals_are_printed_as_met_or_missed_and_decide_the_exit_code(bench):
    met, missed = goal(0.1, at_most=0.15), goal(0.4, at_least=0.5, note="0.8 with all reads")
    text = bench.report(found_with(met, missed))
    assert "- met: memory, V=10: 0.1, at most 0.15\n" in text
    assert "- **missed**: memory, V=10: 0.4, at least 0.5 (0.8 with all reads)" in text
    assert bench.is_success(found_with(met))
    assert not bench.is_success(found_with(missed))
    assert not bench.is_success(found_with(goal(float("nan"), at_most=0.15)))


def test_only_numerical_goals_are_judged_at_tiny_sizes(bench):
    speed, error = found_with(goal(9.0, at_most=1.0), sizes="tiny"), goal(9.0, at_most=1.0, is_numerical=True)
    assert bench.is_success(speed)
    assert "- not judged: memory" in bench.report(speed)
    assert not bench.is_success(found_with(error, sizes="tiny"))
    assert "- **missed**: memory" in bench.report(found_with(error, sizes="tiny"))


def test_a_variant_that_reads_the_logits_twice_has_both_shares_of_the_bandwidth_in_its_row(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed: pip install --no-deps triton==3.7.1")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    reduction = importlib.import_module("gpu.reduction")
    note = reduction._bandwidth_note(0.31, reduction.READS["fused"])
    assert note == "0.31 of the bandwidth by one read; reads 2 times by design: 0.62"
    assert reduction._bandwidth_note(0.5, 1) == "0.50 of the bandwidth by one read"
    assert reduction._bandwidth_note(0.1, None) == "0.10 of the bandwidth by one read; reads more than once"


@pytest.mark.parametrize(
    ("sizes", "outcome", "success"),
    [("full", "skipped", False), ("tiny", "skipped", True), ("full", "passed", True), ("tiny", "failed", False)],
)
def test_a_skipped_test_is_a_failure_on_a_gpu(bench, sizes, outcome, success):
    test = {"kind": "test", "part": "tests", "name": "test_x", "outcome": outcome, "seconds": 1.0, "message": "why"}
    assert bench.is_success(found_with(test, sizes=sizes)) is success
    assert f"- {outcome} in 1.0 s: `test_x`: why" in bench.report(found_with(test, sizes=sizes))


def test_the_table_has_the_name_of_a_part_and_a_case_once(bench):
    names = {"kind": "figure", "part": "head", "case": "V=10"}
    empty = dict.fromkeys(("ms", "rate", "unit", "ratio", "to", "peak_bytes", "note"))
    chunked = {"ms": 123.4, "rate": 2e12, "unit": "B/s", "ratio": 0.5, "to": "ce", "peak_bytes": 3 << 20}
    figures = [names | empty | {"variant": "ce"}, names | empty | chunked | {"variant": "chunked"}]
    lines = bench.report(found_with(*figures)).splitlines()
    assert "| head | V=10 | ce |  |  |  |  |  |" in lines
    assert "|  |  | chunked | 123 | 2,000 GB/s | 0.50 of ce | 3 |  |" in lines


def test_the_report_replaces_only_what_is_between_the_marks_of_a_readme(bench, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench-gpu: begin -->\nold\n<!-- bench-gpu: end -->\nafter\n")
    bench.write_between_marks(readme, "new\n")
    assert readme.read_text() == "before\n<!-- bench-gpu: begin -->\n\nnew\n\n<!-- bench-gpu: end -->\nafter\n"
    readme.write_text("no marks\n")
    with pytest.raises(ValueError, match="expected the lines"):
        bench.write_between_marks(readme, "new\n")
    bench.write_between_marks(_copy_of_readme(bench, tmp_path), "new\n")


def _copy_of_readme(bench, folder):
    copy = folder / "copy.md"
    copy.write_text(bench.README.read_text())
    return copy


def test_show_prints_the_report_of_an_earlier_run(bench, tmp_path):
    earlier = tmp_path / "bench-gpu.json"
    earlier.write_text(json.dumps(found_with(goal(0.4, at_most=0.15))))
    done = bench_gpu("--show", str(earlier))
    assert done.returncode == 1
    assert "**missed**: memory" in done.stdout


def make_wheel(folder, name, tag):
    path = folder / f"{name}-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
    return path


def test_only_compatible_wheels_of_missing_packages_are_unpacked(wheels, monkeypatch, tmp_path):
    installed = {"ml-dtypes", "pydantic-core"}
    monkeypatch.setattr(wheels, "_is_installed", lambda name: name in installed)
    this = f"cp{sys.version_info.major}{sys.version_info.minor}"
    for name, tag in (("pydantic", "py3-none-any"), ("pydantic_core", f"{this}-{this}-manylinux_2_17_x86_64"),
                      ("ml_dtypes", "py3-none-any"), ("liger_kernel", "cp27-cp27m-any")):  # fmt: skip
        make_wheel(tmp_path, name, tag)
    missing = wheels.unpack(tmp_path, tmp_path / "site")
    assert {path.name for path in (tmp_path / "site").iterdir()} == {"pydantic", "pydantic_core"}
    assert missing == ["annotated-types", "typing-inspection", "liger-kernel"]


def test_wheels_have_the_pinned_versions_and_the_given_python_version(wheels, monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(wheels.subprocess, "run", lambda command, **_: commands.append(command))
    (tmp_path / "old-1.0-py3-none-any.whl").write_bytes(b"")
    assert wheels.fetch(tmp_path, "3.12") == []
    (command,) = commands
    assert "--python-version=3.12" in command
    pins = wheels.PINS.read_text().splitlines()
    assert next(argument for argument in command if argument.startswith("pydantic==")) in pins
    assert {argument.split("==")[0] for argument in command if "==" in argument} == set(wheels.PACKAGES)
