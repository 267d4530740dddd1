import importlib
from pathlib import Path

import pytest


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("bench_budget")


def records(control, *students):
    arms = [("control", 1.0, control), *(("student", share, bits) for share, bits in students)]
    return [{"arm": arm, "share": share, "bits_per_byte": bits} for arm, share, bits in arms]


def test_share_needed_is_interpolated_where_the_curve_reaches_the_controls_loss(bench):
    assert bench.share_needed(records(1.0, (0.25, 1.4), (0.5, 1.1), (0.75, 0.9), (1.0, 0.8))) == pytest.approx(0.625)


def test_share_needed_is_not_extrapolated(bench):
    assert bench.share_needed(records(1.0, (0.25, 0.9), (1.0, 0.8))) == 0.25
    assert bench.share_needed(records(1.0, (0.25, 1.4), (1.0, 1.1))) is None


def test_share_needed_for_another_measure_uses_that_measures_curve(bench):
    with_kl = [
        record | {"kl_to_teacher": 2 * record["bits_per_byte"] ** 2} for record in records(1.0, (0.5, 1.1), (1.0, 0.8))
    ]
    with_kl[1]["kl_to_teacher"] = 1.5
    assert bench.share_needed(with_kl, "kl_to_teacher") == 0.5
    assert bench.share_needed(with_kl) > 0.5
