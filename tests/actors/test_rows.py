import numpy as np
import pytest

from actors.rows import Stopwatch, score_rows
from pipeline.contracts import TokenSequence
from pipeline.errors import EngineDead, EngineError, RecipeError, RowError


def rows(count):
    ones = np.ones(3, np.uint8)
    ids = np.arange(3, dtype=np.int32)
    return [TokenSequence(f"s{i}", "d", None, "train", ids, ones, ids) for i in range(count)]


class Moody:
    """Fails on some rows in some way; otherwise answers with the row's name."""

    def __init__(self, bad, error):
        self.bad, self.error, self.calls = set(bad), error, []

    def score(self, sequences):
        names = [sequence.sequence_id for sequence in sequences]
        self.calls.append(names)
        if struck := [name for name in names if name in self.bad]:
            raise self.error(struck[0])
        return names


def names_of(scored):
    return [row.signals for row in scored]


def test_rows_that_the_engine_names_are_set_aside_one_after_the_other():
    scored, lost = score_rows(Moody(["s1", "s3"], lambda name: RowError(name, "too odd")), rows(5))
    assert names_of(scored) == ["s0", "s2", "s4"]
    assert [(casualty.sequence_id, casualty.reason) for casualty in lost] == [("s3", "too odd"), ("s1", "too odd")]


@pytest.mark.parametrize("error", [lambda name: EngineError("bad batch"), lambda name: MemoryError()])
def test_rows_that_nobody_names_are_found_by_halving_and_order_is_kept(error):
    scored, lost = score_rows(Moody(["s2", "s5"], error), rows(8))
    assert names_of(scored) == ["s0", "s1", "s3", "s4", "s6", "s7"]
    assert [casualty.sequence_id for casualty in lost] == ["s2", "s5"]


def test_a_row_error_that_names_a_stranger_cannot_loop_for_ever():
    scored, lost = score_rows(Moody(["s0"], lambda name: RowError("stranger", "who")), rows(2))
    assert names_of(scored) == ["s1"]
    assert len(lost) == 1


@pytest.mark.parametrize("error", [EngineDead, RecipeError])
def test_what_concerns_more_than_a_row_is_passed_on(error):
    with pytest.raises(error):
        score_rows(Moody(["s0"], error), rows(2))


def test_one_by_one_means_one_call_a_row():
    engine = Moody([], EngineError)
    score_rows(engine, rows(3), one_by_one=True)
    assert engine.calls == [["s0"], ["s1"], ["s2"]]


def test_an_engine_without_pause_waits_for_nothing():
    stopwatch = Stopwatch()
    assert stopwatch.wait_share() == 0.0
    stopwatch.timed(1000.0)
    assert stopwatch.wait_share() < 0.01
