from dataclasses import replace

import numpy as np
import pytest

from pipeline.cache.format.schema import ShardSpec
from pipeline.cache.verify.row_checks import violated_invariants
from pipeline.contracts import CaptureSpec, Signals, TargetMode

SPEC = ShardSpec(CaptureSpec(mode=TargetMode.TOPK, k=3), vocabulary=10, hidden_width=4, layers=2)


def signals_of(weights, ids=((1, 2, 3),), tail=-3.0):
    return Signals(
        entry_id_TK=np.array(ids, np.int32),
        entry_logweight_TK=np.array(weights, np.float32),
        tail_logmass_T=np.full(len(weights), tail, np.float32),
        label_logprob_T=np.full(len(weights), -1.0, np.float32),
        entropy_T=np.full(len(weights), 1.0, np.float32),
        log_partition_TC=np.zeros((len(weights), 1), np.float32),
    )


@pytest.mark.parametrize(
    ("weights", "ids", "message"),
    [
        ([[-1.0, -2.0, -1.5]], [[1, 2, 3]], "expected them to fall along a row"),
        ([[-1.0, -np.inf, -2.0]], [[1, 0, 3]], "expected them to fall along a row"),
        ([[-1.0, -2.0, -2.0]], [[1, 3, 2]], "expected the lower id first"),
        ([[-0.1, -0.2, -3.0]], [[1, 2, 3]], "mass of entries and tail: expected at most 1"),
        ([[-1.0, -2.0, np.nan]], [[1, 2, 3]], "expected finite values up to 0"),
        ([[0.5, -2.0, -3.0]], [[1, 2, 3]], "expected finite values up to 0"),
        ([[-1.0, -2.0, -3.0]], [[1, 2, -1]], "expected 0..9"),
        ([[-1.0, -2.0, -3.0]], [[1, 2, 1]], "expected every id once"),
        ([[-np.inf, -np.inf, -np.inf]], [[0, 0, 0]], "expected at least one"),
    ],
)
def test_a_violated_invariant_of_entries_is_reported(weights, ids, message):
    assert any(message in line for line in violated_invariants(signals_of(weights, ids), SPEC))


def test_valid_entries_with_padding_and_ties_pass():
    weights, ids = [[-1.0, -2.0, -2.0], [-0.1, -np.inf, -np.inf]], [[7, 2, 3], [0, 0, 0]]
    assert list(violated_invariants(signals_of(weights, ids), SPEC)) == []


def test_sampled_weights_must_sum_to_1():
    spec = replace(SPEC, capture=replace(SPEC.capture, mode=TargetMode.UNBIASED))
    too_small = signals_of([[-1.0, -2.0, -3.0]], tail=-np.inf)
    assert any("expected 1, got" in line for line in violated_invariants(too_small, spec))
