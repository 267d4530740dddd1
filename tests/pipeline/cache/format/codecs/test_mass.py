"""Checks of row mass: by the encoder, and of stored weights before the decoder rescales them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.format.codecs import decode_signals, encode_signals, wrong_mass
from pipeline.cache.format.codecs.grid import cells, quantise
from pipeline.cache.format.codecs.weights import tail_of_draws
from pipeline.cache.format.schema import ShardSpec
from pipeline.contracts import CaptureSpec, Signals, TargetMode

SCALED = (TargetMode.TOPK, TargetMode.TOPP, TargetMode.UNBIASED)
"""Modes whose decoder rescales rows to 1 minus the tail mass."""


def signals_of(weight_TK, tail_T):
    """Signals with entries sorted by falling weight and arbitrary ids."""
    rows, k = weight_TK.shape
    zeros = np.zeros(rows, np.float32)
    weight_TK = -np.sort(-weight_TK, axis=1)
    with np.errstate(divide="ignore"):
        log_TK, tail_T = np.log(weight_TK).astype(np.float32), np.log(tail_T).astype(np.float32)
    id_TK = np.where(weight_TK > 0, np.arange(k), 0).astype(np.int32)
    return Signals(id_TK, log_TK, tail_T, zeros, zeros, np.zeros((rows, 1), np.float32))


def random_signals(mode, rows, k, vocabulary, seed, evenness):
    """(signals, spec) of random distributions, reduced as the mode does."""
    rng = np.random.default_rng(seed)
    p_TV = -np.sort(-rng.dirichlet(np.full(vocabulary, evenness), size=rows), axis=1)
    kept_TK, tail_T = p_TV[:, :k].copy(), np.maximum(p_TV[:, k:].sum(axis=1), 0.0)
    spec = ShardSpec(CaptureSpec(mode=mode, k=k, draws=50), vocabulary, hidden_width=4, layers=2)
    if mode is TargetMode.TOPP:
        kept_TK[np.cumsum(kept_TK, axis=1) - kept_TK > 0.6] = 0.0
        tail_T = np.maximum(1 - kept_TK.sum(axis=1), 0.0)  # rounding may give less than 0
    elif mode is TargetMode.UNBIASED:
        kept_TK[:, k // 2 :] = np.maximum(p_TV[:, k // 2 :].sum(axis=1, keepdims=True), 0.0) / (k - k // 2)
        kept_TK, tail_T = kept_TK / kept_TK.sum(axis=1, keepdims=True), np.zeros(rows)
    elif mode is TargetMode.SAMPLED:
        kept_TK, tail_T = rng.multinomial(50, p_TV[:, :k] / p_TV[:, :k].sum(axis=1)[:, None]) / 50, np.zeros(rows)
    return signals_of(kept_TK, tail_T), spec


@pytest.fixture
def without_mass_check(monkeypatch):
    """Disable the encoder's check."""
    monkeypatch.setattr("pipeline.cache.format.codecs.signals.check_mass", lambda *_: None)


@pytest.mark.parametrize("mode", list(TargetMode))
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.data(), st.integers(0, 2**32 - 1), st.floats(0.02, 3.0))
def test_no_correct_row_is_reported_as_wrong(mode, vocabulary, data, seed, evenness):
    k = data.draw(st.one_of(st.just(vocabulary), st.integers(1, vocabulary)))
    signals, spec = random_signals(mode, 9, k, vocabulary, seed, evenness)
    wrong_T, mass_T = wrong_mass(encode_signals(signals, spec), 9, spec)
    assert not wrong_T.any()
    if mode is not TargetMode.SAMPLED:
        np.testing.assert_allclose(mass_T, 1 - np.exp(signals.tail_logmass_T.astype(np.float64)), atol=0.1)


@pytest.mark.parametrize("mode", SCALED)
@pytest.mark.parametrize(
    "change", [lambda w: w * 0, lambda w: w - 5, lambda w: w - 0.5, lambda w: np.minimum(w + 0.5, 0)]
)
def test_stored_weights_of_wrong_mass_are_found_although_decoded_rows_sum_to_1(without_mass_check, mode, change):
    signals, spec = random_signals(mode, 40, 16, 200, 1, 0.3)
    kept_TK = np.isfinite(signals.entry_logweight_TK)
    signals.entry_logweight_TK[kept_TK] = change(signals.entry_logweight_TK[kept_TK])
    columns = encode_signals(signals, spec)
    decoded = decode_signals(columns, 41, spec)
    mass_T = np.exp(decoded.entry_logweight_TK.astype(np.float64)).sum(axis=1) + np.exp(decoded.tail_logmass_T)
    np.testing.assert_allclose(mass_T, 1.0, atol=1e-3)
    several_T = kept_TK.sum(axis=1) > 1
    assert wrong_mass(columns, 40, spec)[0][several_T].all()


@pytest.mark.parametrize("mode", list(TargetMode))
@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_the_encoder_refuses_rows_that_do_not_sum_to_1(mode, factor):
    signals, spec = random_signals(mode, 5, 8, 100, 2, 0.3)
    encode_signals(signals, spec)
    signals.entry_logweight_TK[3] += np.float32(np.log(factor))
    with pytest.raises(ValueError, match="entries and tail of row 3: expected a mass of 1, got"):
        encode_signals(signals, spec)


@pytest.mark.parametrize("tail", [0.5, np.nan])
def test_the_encoder_refuses_a_tail_that_is_not_a_log_mass(tail):
    signals, spec = random_signals(TargetMode.TOPK, 5, 8, 100, 2, 0.3)
    signals.tail_logmass_T[1] = tail
    with pytest.raises(ValueError, match="entries and tail of row 1"):
        encode_signals(signals, spec)


def test_every_log_weight_is_within_the_bounds_of_its_code():
    value = -np.geomspace(1e-7, 80.0, 20_000).astype(np.float32)
    lowest, highest = cells()
    code = quantise(value)
    assert (value >= lowest[code] - 1e-7).all()
    assert (value <= highest[code] + 1e-7).all()
    np.testing.assert_allclose(lowest[:-1], highest[1:], rtol=2**-9)


def test_counts_that_sum_to_more_than_the_draws_leave_no_tail():
    logweight_TK = np.log(np.array([[5, 4], [5, 3], [3, 1]]) / 8).astype(np.float32)
    with np.errstate(invalid="raise"):
        tail_T = tail_of_draws(logweight_TK, draws=8)
    np.testing.assert_array_equal(tail_T, np.array([-np.inf, -np.inf, np.log(0.5)], np.float32))
