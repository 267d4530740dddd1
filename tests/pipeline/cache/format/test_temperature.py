import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.format.temperature import head_log_sum, partition_at, tail_log_sum
from pipeline.contracts import Signals

TEMPERATURES = (1.0, 1.1, 1.25, 1.4, 1.5, 1.75, 2.0, 2.25, 2.5)


def log_sum(values_TV, axis=-1):
    peak = values_TV.max(axis=axis, keepdims=True)
    return (peak + np.log(np.exp(values_TV - peak).sum(axis=axis, keepdims=True))).squeeze(axis)


def mean_at(logprob_TV, b):
    weight = np.exp(b * logprob_TV - log_sum(b * logprob_TV)[:, None])
    return (weight * logprob_TV).sum(axis=1)


def split(logits_TV, k):
    """(entries, tail) log-probabilities, each row sorted."""
    logprob = np.sort(logits_TV - log_sum(logits_TV)[:, None], axis=1)[:, ::-1]
    return logprob[:, :k], logprob[:, k:]


def shape_of(tail_TV):
    return np.stack([log_sum(tail_TV / 2), mean_at(tail_TV, 0.5), mean_at(tail_TV, 1.0)], axis=1)


def error_at(tail_TV, temperature, dtype=np.float64):
    size = np.full(len(tail_TV), tail_TV.shape[1])
    kept = [np.asarray(x, dtype).astype(np.float32) for x in (log_sum(tail_TV), shape_of(tail_TV))]
    return np.abs(tail_log_sum(size, *kept, temperature) - log_sum(tail_TV / temperature))


def language_model_tails(rng, rows=64, vocabulary=20_000, k=64):
    """Tails of normal logits, 5% of them raised: most of a vocabulary is very unlikely, some of it is not."""
    raised = rng.random((rows, vocabulary)) < 0.05
    logits = rng.normal(size=(rows, vocabulary)) * rng.uniform(1.5, 3.0, size=(rows, 1))
    return split(logits + raised * rng.exponential(3.0, size=(rows, vocabulary)), k)[1]


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_realistic_tail_is_interpolated_within_a_hundredth_of_a_nat(temperature):
    error = error_at(language_model_tails(np.random.default_rng(1)), temperature)
    assert error.max() < 0.01


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_rounding_the_scalars_to_float16_adds_under_a_hundredth(temperature):
    tail = language_model_tails(np.random.default_rng(2))
    assert error_at(tail, temperature, np.float16).max() < error_at(tail, temperature).max() + 0.01


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_tail_is_exact_at_temperatures_1_and_2(temperature):
    assert error_at(language_model_tails(np.random.default_rng(3)), temperature).max() < 1e-4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 3000),
    spread=st.floats(0.0, 3.0),
    level=st.floats(-25.0, -1.0),
    temperature=st.floats(1.0, 2.5),
)
def test_any_tail_of_moderate_spread_is_interpolated_within_a_tenth_of_a_nat(seed, size, spread, level, temperature):
    tail = level + spread * np.random.default_rng(seed).normal(size=(4, size))
    assert error_at(tail, temperature).max() < 0.1


def test_three_scalars_are_ten_times_as_accurate_as_the_tail_mass_alone():
    tail = language_model_tails(np.random.default_rng(4))
    line = np.log(tail.shape[1]) + (log_sum(tail) - np.log(tail.shape[1])) / 1.5
    assert error_at(tail, 1.5).max() < np.abs(line - log_sum(tail / 1.5)).max() / 10


@pytest.mark.parametrize("temperature", [1.0, 1.3, 2.5])
def test_the_log_partition_over_the_vocabulary_is_computed_from_entries_and_scalars(temperature):
    rng = np.random.default_rng(5)
    head, tail = split(rng.normal(size=(32, 5000)) * 2.5, 50)
    zeros = np.zeros(32, np.float32)
    signals = Signals(
        entry_id_TK=np.zeros(head.shape, np.int32),
        entry_logweight_TK=head.astype(np.float32),
        tail_logmass_T=log_sum(tail).astype(np.float32),
        label_logprob_T=zeros,
        entropy_T=zeros,
        log_partition_TC=zeros[:, None],
        tail_shape_T3=shape_of(tail).astype(np.float32),
    )
    tail_T, partition_T = partition_at(signals, 5000, temperature)
    expected = log_sum(np.concatenate([head, tail], axis=1) / temperature)
    np.testing.assert_allclose(partition_T, expected, atol=0.02)
    np.testing.assert_allclose(
        head_log_sum(signals.entry_logweight_TK, temperature), log_sum(head / temperature), atol=1e-4
    )
    assert (tail_T < partition_T).all()


def test_an_empty_tail_stays_empty():
    nothing = np.full(2, -np.inf, np.float32)
    shape = np.stack([nothing, np.full(2, np.nan), np.full(2, np.nan)], axis=1).astype(np.float32)
    assert np.isneginf(tail_log_sum(np.array([0, 9]), nothing, shape, 1.5)).all()


@pytest.mark.parametrize("temperature", [0.5, 0.999, 2.51, float("nan")])
def test_a_temperature_outside_the_range_is_refused(temperature):
    zeros = np.zeros(1, np.float32)
    with pytest.raises(ValueError, match=r"temperature: expected 1.0 to 2.5, got"):
        tail_log_sum(np.array([5]), zeros, np.zeros((1, 3), np.float32), temperature)
