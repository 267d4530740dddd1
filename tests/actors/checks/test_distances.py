from dataclasses import replace

import numpy as np
import pytest

from actors.checks.distances import DISTANCES, bounded_kl, distances
from actors.signals.reference import reference_signals
from pipeline.contracts import CaptureSpec, TargetMode

VOCABULARY, ROWS = 3000, 24


def softmax(logits_TV):
    share_TV = np.exp(logits_TV - logits_TV.max(1, keepdims=True))
    return share_TV / share_TV.sum(1, keepdims=True)


def signals_of(logits_TV, mode, **changes):
    label_T = np.arange(ROWS) % VOCABULARY
    signals = reference_signals(logits_TV, label_T, CaptureSpec(mode=mode, k=12, draws=12), "s", None)
    return replace(signals, **changes)


def logits(seed, spread=2.0):
    return np.random.default_rng(seed).normal(0, spread, (ROWS, VOCABULARY))


def named(p, q, mode=TargetMode.TOPK):
    return dict(zip(DISTANCES, distances(p, q, mode) / ROWS, strict=True))


@pytest.mark.parametrize("mode", list(TargetMode))
@pytest.mark.parametrize(("spread", "noise"), [(0.3, 0.1), (2.0, 0.1), (2.0, 1.0), (6.0, 3.0)])
def test_the_divergence_never_exceeds_the_exact_one(mode, spread, noise):
    p_TV, q_TV = logits(0, spread), logits(0, spread) + logits(1, noise)
    exact_T = (softmax(p_TV) * (np.log(softmax(p_TV)) - np.log(softmax(q_TV)))).sum(1)
    bound_T = bounded_kl(signals_of(p_TV, mode), signals_of(q_TV, mode), mode)
    assert (bound_T >= 0).all()
    assert (bound_T <= exact_T + 1e-3).all()


@pytest.mark.parametrize("mode", [TargetMode.TOPK, TargetMode.TOPP, TargetMode.UNBIASED])
def test_signals_without_a_common_id_are_far_apart(mode):
    p = signals_of(logits(0), mode)
    shifted = replace(p, entry_id_TK=(p.entry_id_TK + VOCABULARY // 2) % VOCABULARY)
    found = named(p, shifted, mode)
    assert found["kl_nats"] > 0.01
    assert found["top_share"] > 0.9
    assert found["entry_share"] > 0.9


@pytest.mark.parametrize("mode", list(TargetMode))
def test_the_distance_of_signals_to_themselves_is_0(mode):
    p = signals_of(logits(0), mode)
    assert not distances(p, p, mode).any()


def test_every_distance_measures_its_own_field():
    p = signals_of(logits(0), TargetMode.TOPK)
    assert named(p, replace(p, label_logprob_T=p.label_logprob_T - 0.5))["label_nats"] == pytest.approx(0.5, rel=1e-5)
    assert named(p, replace(p, entropy_T=p.entropy_T + 0.25))["entropy_nats"] == pytest.approx(0.25, rel=1e-5)
    swapped = replace(p, entry_id_TK=p.entry_id_TK[:, ::-1])
    assert named(p, swapped)["top_share"] == 1.0
    assert named(p, swapped)["entry_share"] == 0.0


def test_a_tie_at_the_top_is_no_other_top_entry():
    p = signals_of(logits(0), TargetMode.TOPK)
    tied = replace(p, entry_logweight_TK=np.full_like(p.entry_logweight_TK, -5.0), entry_id_TK=p.entry_id_TK[:, ::-1])
    assert named(p, tied)["top_share"] == 0.0


def test_hidden_states_count_relative_to_their_size_and_missing_ones_are_infinitely_far():
    ones = np.full((ROWS, 2, 8), 0x3F80, np.uint16)
    p = signals_of(logits(0), TargetMode.TOPK, hidden_TLD=ones)
    one_layer_doubled = ones.copy()
    one_layer_doubled[:, 1] = 0x4000
    assert named(p, replace(p, hidden_TLD=one_layer_doubled))["hidden_share"] == pytest.approx(0.5)
    assert named(p, replace(p, hidden_TLD=None))["hidden_share"] == np.inf
    exact = replace(p, exact_hidden_TD=ones[:, 0])
    assert named(exact, replace(exact, exact_hidden_TD=ones[:, 0] + np.uint16(0x80)))["hidden_share"] > 0.3


def test_nan_stays_nan():
    p = signals_of(logits(0), TargetMode.TOPK)
    assert np.isnan(named(p, replace(p, entropy_T=np.full_like(p.entropy_T, np.nan)))["entropy_nats"])
