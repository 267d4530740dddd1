import importlib
from pathlib import Path

import pytest


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("bench_student")


def record(variant, seconds, peak_bytes, **more):
    return {"variant": variant, "vocabulary": 10, "tokens": 4, "seconds": seconds, "peak_bytes": peak_bytes, **more}


def test_every_goal_is_printed_as_met_or_missed_with_its_measurement(bench):
    records = [record("ce", 1.0, 50), record("dense", 2.0, 100), record("chunked", 1.2, 10)]
    records.append(record("training", 1.0, 5, input_wait_share=0.03) | {"vocabulary": 7})
    verdicts = bench.table(records).splitlines()[-3:]
    assert [line.split()[0] for line in verdicts] == ["MISSED", "met", "MISSED"]
    assert "time of chunked to ce" in verdicts[0]
    assert "1.2000, at most 1.15" in verdicts[0]
    assert "0.1000, at most 0.15" in verdicts[1]
    assert "0.0300, at most 0.02" in verdicts[2]


def test_wait_share_leaves_out_the_first_step(bench):
    steps = [{"seconds": s, "input_wait_share": w} for s, w in ((9.0, 1.0), (1.0, 0.5), (3.0, 0.1))]
    assert bench.wait_share(steps) == pytest.approx(0.2)
