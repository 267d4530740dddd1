import numpy as np
import pytest

from actors.scoring.score_rows import Stopwatch, score_rows
from pipeline.contracts import TokenSequence
from pipeline.errors import EngineDead, EngineError, RecipeError, RowError


def rows(count):
    ones = np.ones(3, np.uint8)
    ids = np.arange(3, dtype=np.int32)
    return [TokenSequence(f"s{i}", "d", None, "train", ids, ones, ids) for i in range(count)]


class FailingEngine:
    """Raises on the `bad` rows; otherwise returns the names of the rows."""

    def __init__(self, bad, error):
        self.bad, self.error, self.calls = set(bad), error, []

    def score(self, sequences):
        names = [sequence.sequence_id for sequence in sequences]
        self.calls.append(names)
        if failing := [name for name in names if name in self.bad]:
            raise self.error(failing[0])
        return names


def names_of(scored):
    return [row.signals for row in scored]


def test_rows_that_the_engine_names_are_set_aside_one_after_the_other():
    scored, lost = score_rows(FailingEngine(["s1", "s3"], lambda name: RowError(name, "too odd")), rows(5))
    assert names_of(scored) == ["s0", "s2", "s4"]
    assert [(row.sequence_id, row.reason) for row in lost] == [("s3", "too odd"), ("s1", "too odd")]


@pytest.mark.parametrize("error", [lambda name: EngineError("bad batch"), lambda name: MemoryError()])
def test_rows_without_a_row_error_are_found_by_bisection_and_order_is_kept(error):
    scored, lost = score_rows(FailingEngine(["s2", "s5"], error), rows(8))
    assert names_of(scored) == ["s0", "s1", "s3", "s4", "s6", "s7"]
    assert [row.sequence_id for row in lost] == ["s2", "s5"]


def test_a_row_error_that_names_an_unknown_row_does_not_loop_for_ever():
    scored, lost = score_rows(FailingEngine(["s0"], lambda name: RowError("unknown", "who")), rows(2))
    assert names_of(scored) == ["s1"]
    assert len(lost) == 1


@pytest.mark.parametrize("error", [EngineDead, RecipeError])
def test_errors_that_concern_more_than_a_row_are_raised(error):
    with pytest.raises(error):
        score_rows(FailingEngine(["s0"], error), rows(2))


def test_one_by_one_means_one_call_a_row():
    engine = FailingEngine([], EngineError)
    score_rows(engine, rows(3), one_by_one=True)
    assert engine.calls == [["s0"], ["s1"], ["s2"]]


def test_an_engine_that_is_always_busy_has_no_wait_share():
    stopwatch = Stopwatch()
    assert stopwatch.wait_share() == 0.0
    stopwatch.add(1000.0)
    assert stopwatch.wait_share() < 0.01
