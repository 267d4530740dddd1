from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.bfloat16 import to_bfloat16, to_float32
from pipeline.cache.format.codecs import decode_signals, encode_signals
from pipeline.cache.format.codecs.grid import levels, quantise, step_at
from pipeline.cache.format.codecs.weights import MIN_SCALED_MASS
from pipeline.cache.format.schema import ShardSpec
from pipeline.contracts import CaptureSpec, Signals, TargetMode

MAX_ENTRIES = 60_000
WIDTH = 6


def spec_of(capture, vocabulary=1000):
    return ShardSpec(capture, vocabulary, hidden_width=WIDTH, layers=4)


PLAIN = CaptureSpec()


def signals_of(entry_id_TK, logweight_TK, tail_T, capture=PLAIN, rng=None):
    rng = rng or np.random.default_rng(0)
    rows = len(tail_T)
    scalar = lambda *shape: -rng.exponential(3.0, size=(rows, *shape)).astype(np.float32)  # noqa: E731
    states = lambda *shape: rng.integers(0, 2**16, size=(rows, *shape)).astype(np.uint16)  # noqa: E731
    partitions = scalar(len(capture.temperatures))
    partitions[:, [t == 1.0 for t in capture.temperatures]] = 0.0
    return Signals(
        entry_id_TK=entry_id_TK.astype(np.int32),
        entry_logweight_TK=logweight_TK.astype(np.float32),
        tail_logmass_T=tail_T.astype(np.float32),
        label_logprob_T=scalar(),
        entropy_T=-scalar(),
        log_partition_TC=partitions,
        tail_shape_T3=scalar(3) if capture.any_temperature else None,
        boundary_logmass_T=scalar() if capture.boundary else None,
        hidden_TLD=states(len(capture.hidden_layers), WIDTH) if capture.hidden_layers else None,
    )


def in_order(id_TK, logweight_TK):
    """Sort rows by falling weight, ties by rising id; padding has id 0."""
    logweight_TK = logweight_TK.astype(np.float32)
    order = np.lexsort((id_TK, -logweight_TK))
    id_TK, logweight_TK = np.take_along_axis(id_TK, order, 1), np.take_along_axis(logweight_TK, order, 1)
    return np.where(np.isfinite(logweight_TK), id_TK, 0), logweight_TK


def distinct_ids(rng, rows, k, vocabulary):
    """Distinct ids in each row, some of them shared by neighbouring rows."""
    permuted = rng.permutation(vocabulary)
    return np.stack([np.roll(permuted, -int(rng.integers(0, 4)) * row)[:k] for row in range(rows)])


def normalised(logit_TK, target_T):
    """Log-weights whose sum is `exp(target)`, in float64."""
    peak = logit_TK.max(axis=1, keepdims=True)
    total = peak + np.log(np.exp(logit_TK - peak).sum(axis=1, keepdims=True))
    return logit_TK - total + target_T[:, None]


@st.composite
def shapes(draw):
    """(rows, k, vocabulary): V up to 2^20, T from 1, k up to V and often V if that is small."""
    vocabulary = draw(st.one_of(st.integers(1, 300), st.integers(1, 2**20), st.just(2**20)))
    most = min(vocabulary, MAX_ENTRIES)
    k = draw(st.one_of(st.integers(1, min(vocabulary, 200)), st.integers(1, most), st.just(min(vocabulary, 300))))
    rows = draw(st.integers(1, max(1, min(12, MAX_ENTRIES // k))))
    return rows, k, vocabulary


def top_entries(rng, rows, k, vocabulary, spread, min_count):
    """Entries and tail of random rows with at least `min_count` entries; the rest is padding."""
    count_T = rng.integers(min(min_count, k), k + 1, size=rows)
    tail_T = -rng.exponential(rng.choice([0.1, 3.0, 30.0]), size=rows)
    tail_T[(rng.random(rows) < 0.2) | (k == vocabulary)] = -np.inf
    head_T = np.log(-np.expm1(tail_T))
    logit_TK = rng.normal(size=(rows, k)) * spread
    logit_TK[np.arange(k) >= count_T[:, None]] = -np.inf
    id_TK, weight_TK = in_order(distinct_ids(rng, rows, k, vocabulary), normalised(logit_TK, head_T))
    return id_TK, weight_TK, tail_T.astype(np.float32)


def assert_contract(decoded, original):
    """Assert the same ids and padding, falling weights, and rising ids among ties."""
    id_TK, weight_TK = decoded.entry_id_TK, decoded.entry_logweight_TK
    assert (np.isfinite(weight_TK) == np.isfinite(original.entry_logweight_TK)).all()
    assert (np.sort(id_TK, axis=1) == np.sort(original.entry_id_TK, axis=1)).all()
    falling = weight_TK[:, 1:] < weight_TK[:, :-1]
    tied = weight_TK[:, 1:] == weight_TK[:, :-1]
    padding = np.isneginf(weight_TK[:, 1:])
    assert (falling | padding | (tied & (id_TK[:, 1:] > id_TK[:, :-1]))).all()


def by_id(signals):
    order = np.lexsort((signals.entry_logweight_TK, signals.entry_id_TK))
    return np.take_along_axis(signals.entry_logweight_TK.astype(np.float64), order, axis=1)


def stated_error(weight_TK):
    """Half a step at each entry, half the weighted mean step for the rescaling, 2^-10 for the tail's rounding."""
    step_TK = np.maximum(np.minimum(np.exp(-weight_TK / 2) / 80, 0.2), -weight_TK / 48)
    step_TK[~np.isfinite(weight_TK)] = 0.0
    mass_TK = np.exp(weight_TK)
    scaling_T1 = (mass_TK * step_TK).sum(axis=1, keepdims=True) / mass_TK.sum(axis=1, keepdims=True)
    return 1.05 * (step_TK + scaling_T1) / 2 + 2**-10


@settings(max_examples=80, deadline=None)
@given(shapes(), st.integers(0, 2**32 - 1), st.floats(0.0, 8.0), st.booleans())
def test_top_entries_are_decoded_to_the_stated_precision(shape, seed, spread, full):
    rows, k, vocabulary = shape
    mode = TargetMode.TOPK if full else TargetMode.TOPP
    spec = spec_of(CaptureSpec(mode=mode, k=k), vocabulary)
    rng = np.random.default_rng(seed)
    original = signals_of(*top_entries(rng, rows, k, vocabulary, spread, min_count=k if full else 1))
    decoded = decode_signals(encode_signals(original, spec), rows + 1, spec)
    assert_contract(decoded, original)
    original_TK = np.maximum(by_id(original), levels()[-1])
    original_TK[np.isneginf(by_id(original))] = -np.inf
    valid_TK = np.isfinite(original_TK) & (-np.expm1(original.tail_logmass_T) >= 2 * MIN_SCALED_MASS)[:, None]
    error_TK = np.abs(by_id(decoded)[valid_TK] - original_TK[valid_TK])
    assert (error_TK <= stated_error(original_TK)[valid_TK]).all()


@settings(max_examples=40, deadline=None)
@given(shapes(), st.integers(0, 2**32 - 1), st.floats(0.0, 8.0))
def test_decoded_rows_sum_to_one_minus_the_tail(shape, seed, spread):
    rows, k, vocabulary = shape
    spec = spec_of(CaptureSpec(k=k), vocabulary)
    original = signals_of(*top_entries(np.random.default_rng(seed), rows, k, vocabulary, spread, min_count=k))
    decoded = decode_signals(encode_signals(original, spec), rows + 1, spec)
    mass_T = np.exp(decoded.entry_logweight_TK.astype(np.float64)).sum(axis=1) + np.exp(decoded.tail_logmass_T)
    np.testing.assert_allclose(mass_T, 1.0, atol=1e-3)
    np.testing.assert_allclose(decoded.tail_logmass_T, original.tail_logmass_T, rtol=2**-11, atol=1e-7)


def threshold_sample(rng, rows, k, vocabulary, spread):
    """Rows of head-exact threshold sampling of random probabilities, with arbitrary ids.

    There are 2k probabilities, or k or fewer: then all are kept exactly, and the rest of the row is padding.
    """
    weight_TK = np.zeros((rows, k))
    for row in range(rows):
        possible = 2 * k if rng.random() < 0.7 else int(rng.integers(1, k + 1))
        p = np.sort(np.exp(normalised(rng.normal(size=(1, possible)) * spread, np.zeros(1)))[0])[::-1]
        if possible <= k:
            weight_TK[row, :possible] = p
            continue
        left = 1.0 - np.concatenate([[0.0], np.cumsum(p)])
        head = next(m for m in range(k) if p[m] <= left[m] / (k - m) * (1 + 1e-12))
        weight_TK[row] = np.concatenate([p[:head], np.full(k - head, left[head] / (k - head))])
    with np.errstate(divide="ignore"):
        return in_order(distinct_ids(rng, rows, k, vocabulary), np.log(weight_TK))


def stated_error_of_samples(weight_TK):
    """Half a step, one step at the threshold's code, 2^-11 of the threshold itself; plus their mean for rescaling."""
    valid_TK = np.isfinite(weight_TK)
    threshold_T1 = np.where(valid_TK, weight_TK, 0.0).min(axis=1, keepdims=True)
    step_TK = np.array([[step_at(w) if np.isfinite(w) else 0.0 for w in row] for row in weight_TK.tolist()])
    in_cell_TK = quantise(weight_TK.astype(np.float32)) >= quantise(threshold_T1.astype(np.float32))
    error_TK = 1.05 * np.where(in_cell_TK, step_TK, step_TK / 2)
    error_TK = np.where(weight_TK == threshold_T1, -(2**-11) * threshold_T1 + 2**-24, error_TK)
    mass_TK = np.exp(weight_TK)
    scaling_T1 = np.log((mass_TK * np.exp(error_TK)).sum(axis=1) / mass_TK.sum(axis=1))[:, None]
    return error_TK + scaling_T1 + 1e-6


@settings(max_examples=60, deadline=None)
@given(shapes(), st.integers(0, 2**32 - 1), st.floats(0.0, 4.0))
def test_unbiased_rows_sum_to_one_and_their_tails_have_one_weight(shape, seed, spread):
    rows, k, vocabulary = shape
    spec = spec_of(CaptureSpec(mode=TargetMode.UNBIASED, k=k), vocabulary)
    id_TK, weight_TK = threshold_sample(np.random.default_rng(seed), rows, k, vocabulary, spread)
    original = signals_of(id_TK, weight_TK, np.full(rows, -np.inf))
    decoded = decode_signals(encode_signals(original, spec), rows + 1, spec)
    assert_contract(decoded, original)
    np.testing.assert_allclose(np.exp(decoded.entry_logweight_TK.astype(np.float64)).sum(axis=1), 1.0, atol=1e-3)
    assert np.isneginf(decoded.tail_logmass_T).all()
    for row, weight_K in enumerate(original.entry_logweight_TK):
        least_K = weight_K == weight_K[np.isfinite(weight_K)].min()
        tail_K = np.isin(decoded.entry_id_TK[row], id_TK[row][least_K]) & np.isfinite(decoded.entry_logweight_TK[row])
        assert len(set(decoded.entry_logweight_TK[row][tail_K].tolist())) == 1
    original_TK, got_TK = by_id(original), by_id(decoded)
    valid_TK = np.isfinite(original_TK)
    assert (np.abs(got_TK[valid_TK] - original_TK[valid_TK]) <= stated_error_of_samples(original_TK)[valid_TK]).all()


@settings(max_examples=40, deadline=None)
@given(shapes(), st.integers(0, 2**32 - 1), st.integers(1, 70_000))
def test_sampled_counts_are_exact(shape, seed, draws):
    rows, k, vocabulary = shape
    rng = np.random.default_rng(seed)
    count_TK = -np.sort(-rng.multinomial(draws, rng.dirichlet(np.full(k, 0.3)), size=rows), axis=1)
    with np.errstate(divide="ignore"):
        id_TK, weight_TK = in_order(distinct_ids(rng, rows, k, vocabulary), np.log(count_TK / draws))
    spec = spec_of(CaptureSpec(mode=TargetMode.SAMPLED, k=k, draws=draws), vocabulary)
    original = signals_of(id_TK, weight_TK, np.full(rows, -np.inf))
    decoded = decode_signals(encode_signals(original, spec), rows + 1, spec)
    assert_contract(decoded, original)
    assert (np.rint(np.exp(decoded.entry_logweight_TK.astype(np.float64)) * draws) == count_TK).all()
    assert np.isneginf(decoded.tail_logmass_T).all()


def test_draws_outside_the_k_entries_are_the_tail():
    spec = spec_of(CaptureSpec(mode=TargetMode.SAMPLED, k=2, draws=10))
    original = signals_of(np.array([[5, 3]]), np.log([[0.4, 0.3]]), np.log([0.3]))
    decoded = decode_signals(encode_signals(original, spec), 2, spec)
    np.testing.assert_allclose(decoded.tail_logmass_T, np.log([0.3]), rtol=1e-6)
    np.testing.assert_allclose(decoded.entry_logweight_TK, np.log([[0.4, 0.3]]), rtol=1e-6)


def test_a_row_can_hold_a_vocabulary_of_a_million():
    vocabulary = 2**20
    spec = spec_of(CaptureSpec(k=vocabulary), vocabulary)
    rng = np.random.default_rng(0)
    original = signals_of(*top_entries(rng, 1, vocabulary, vocabulary, 3.0, min_count=vocabulary))
    decoded = decode_signals(encode_signals(original, spec), 2, spec)
    assert_contract(decoded, original)
    assert np.abs(by_id(decoded) - by_id(original)).max() < 0.5


def test_top_entries_of_a_language_model_lose_under_five_ten_thousandths_of_a_nat():
    rng = np.random.default_rng(0)
    rank = np.arange(1, 20_001)
    logit = -rng.uniform(0.9, 2.2, size=(400, 1)) * np.log(rank) + rng.normal(size=(400, 20_000)) * 0.3
    logprob = normalised(np.sort(logit, axis=1)[:, ::-1], np.zeros(400))
    for k in (50, 64, 128):
        tail = np.log(np.exp(logprob[:, k:]).sum(axis=1))
        original = signals_of(distinct_ids(rng, 400, k, 20_000), logprob[:, :k], tail)
        spec = spec_of(CaptureSpec(k=k), 20_000)
        decoded = decode_signals(encode_signals(original, spec), 401, spec)
        p, q, tail = by_id(original), by_id(decoded), decoded.tail_logmass_T.astype(np.float64)
        kl_T = (np.exp(p) * (p - q)).sum(axis=1) + np.exp(original.tail_logmass_T) * (original.tail_logmass_T - tail)
        assert 0 < kl_T.mean() < 5e-4


def test_the_grid_has_the_stated_steps():
    value = -np.geomspace(1e-6, -float(levels()[-1]), 5000).astype(np.float32)
    error = np.abs(levels()[quantise(value)] - value)
    assert all(e <= 0.53 * step_at(float(v)) for e, v in zip(error, value, strict=True))
    assert (np.diff(levels()) < 0).all()
    assert levels()[-1] < -60
    assert (levels() * 2**14 == np.rint(levels() * 2**14)).all()


def test_ranks_beyond_the_vocabulary_are_refused_before_memory_is_allocated():
    spec, original = spec_of(EVERYTHING), some_signals()
    columns = encode_signals(original, spec)
    high = f"entry_gap_{spec.id_bytes - 1}"
    columns[high] = b"\xff" * len(columns[high])
    with pytest.raises(ValueError, match="ranks of ids: expected less than"):
        decode_signals(columns, 10, spec)


EVERYTHING = CaptureSpec(
    k=5, temperatures=(0.7, 1.0, 2.0), any_temperature=True, boundary=True, hidden_layers=(2, -1), seed=1
)


def some_signals(rows=9, capture=EVERYTHING, seed=0):
    rng = np.random.default_rng(seed)
    signals = signals_of(*top_entries(rng, rows, capture.k, 1000, 2.0, min_count=capture.k), capture, rng)
    exact_TD = rng.integers(0, 2**16, size=(rows, WIDTH)).astype(np.uint16)
    return replace(signals, exact_hidden_TD=exact_TD)


def test_scalars_are_decoded_to_float16_precision():
    original = some_signals()
    decoded = decode_signals(encode_signals(original, spec_of(EVERYTHING)), 10, spec_of(EVERYTHING))
    for name in ("label_logprob_T", "entropy_T", "log_partition_TC", "tail_shape_T3", "boundary_logmass_T"):
        np.testing.assert_allclose(getattr(decoded, name), getattr(original, name), rtol=2**-11, atol=3e-8)
    assert (decoded.log_partition_TC[:, 1] == 0).all()


def test_scalars_keep_infinities_and_underflow_to_them():
    far = np.array([-np.inf, -1e6, -65000.0, -1e-9], np.float32)
    original = replace(some_signals(4), label_logprob_T=far, boundary_logmass_T=far)
    decoded = decode_signals(encode_signals(original, spec_of(EVERYTHING)), 5, spec_of(EVERYTHING))
    np.testing.assert_allclose(decoded.label_logprob_T, [-np.inf, -np.inf, -65000, 0], rtol=2**-11, atol=3e-8)


def test_bfloat16_states_are_decoded_bit_for_bit():
    original = some_signals()
    decoded = decode_signals(encode_signals(original, spec_of(EVERYTHING)), 10, spec_of(EVERYTHING))
    assert (decoded.hidden_TLD == original.hidden_TLD).all()
    assert (decoded.exact_hidden_TD == original.exact_hidden_TD).all()


def test_a_sequence_that_is_not_audited_has_no_exact_states():
    original = replace(some_signals(), exact_hidden_TD=None)
    columns = encode_signals(original, spec_of(EVERYTHING))
    assert columns["exact_hidden"] == b""
    assert decode_signals(columns, 10, spec_of(EVERYTHING)).exact_hidden_TD is None


def test_int8_states_are_within_half_a_step_of_their_channel():
    capture = replace(EVERYTHING, hidden_codec="int8")
    rng = np.random.default_rng(3)
    values = (rng.normal(size=(200, 2, WIDTH)) * np.array([1e-3, 1, 5, 80, 2000, 0])).astype(np.float32)
    original = replace(some_signals(200), hidden_TLD=to_bfloat16(values))
    exact = to_float32(original.hidden_TLD)
    decoded = decode_signals(encode_signals(original, spec_of(capture)), 201, spec_of(capture))
    got = to_float32(decoded.hidden_TLD)
    assert (np.abs(got - exact) <= np.abs(exact).max(axis=0) / 254 * 1.001 + np.abs(exact) * 2**-8).all()


def test_int8_refuses_states_that_are_not_finite():
    capture = replace(EVERYTHING, hidden_codec="int8")
    original = replace(some_signals(), hidden_TLD=np.full((9, 2, WIDTH), 0x7FC0, np.uint16))
    with pytest.raises(ValueError, match="expected finite values for int8"):
        encode_signals(original, spec_of(capture))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entropy_T": np.zeros(3, np.float32)}, r"entropy_T: expected shape \(9,\), got \(3,\)"),
        ({"entry_id_TK": np.zeros((9, 4), np.int32)}, r"entry_id_TK: expected shape \(9, 5\), got \(9, 4\)"),
        ({"boundary_logmass_T": None}, r"boundary_logmass_T: expected shape \(9,\), got None"),
        ({"hidden_TLD": None}, r"hidden_TLD: expected shape \(9, 2, 6\), got None"),
        ({"entry_id_TK": np.tile(np.arange(5, dtype=np.int32) - 1, (9, 1))}, r"expected 0..65535, got -1..3"),
        ({"entry_id_TK": np.tile(np.arange(5, dtype=np.int32) + 65532, (9, 1))}, r"expected 0..65535, got 0..65536"),
        ({"entry_id_TK": np.tile(np.array([4, 1, 4, 2, 3], np.int32), (9, 1))}, "every id once in a row"),
        ({"entry_logweight_TK": np.zeros((9, 5), np.float32) + np.arange(5, dtype=np.float32)}, "row 0.*falling"),
        ({"entry_logweight_TK": np.full((9, 5), np.nan, np.float32)}, "row 0.*finite log-weights"),
    ],
)
def test_signals_that_violate_the_contract_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        encode_signals(replace(some_signals(), **change), spec_of(EVERYTHING))


@pytest.mark.parametrize("mode", list(TargetMode))
def test_a_column_that_lacks_a_byte_is_refused(mode):
    capture = replace(EVERYTHING, mode=mode, draws=8)
    rng = np.random.default_rng(0)
    weight = np.tile(np.log([[0.5, 0.125, 0.125, 0.125, 0.125]]), (9, 1))
    original = signals_of(distinct_ids(rng, 9, 5, 1000), np.sort(weight)[:, ::-1], np.full(9, -np.inf), capture, rng)
    spec = spec_of(capture)
    columns = encode_signals(replace(original, exact_hidden_TD=original.hidden_TLD[:, 0]), spec)
    for name, data in columns.items():
        if data:
            with pytest.raises(ValueError):
                decode_signals(columns | {name: data[:-1]}, 10, spec)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", list(TargetMode))
def test_damaged_columns_give_a_value_error_or_other_signals_and_nothing_else(mode):
    capture = CaptureSpec(mode=mode, k=5, draws=8)
    rng = np.random.default_rng(0)
    weight = np.tile(np.log([[0.5, 0.125, 0.125, 0.125, 0.125]]), (9, 1))
    weight[3:5] = np.log([0.5, 0.25, 0.125, 0.125, 1.0])
    weight[3:5, 4] = -np.inf
    spec = spec_of(capture)
    columns = encode_signals(signals_of(distinct_ids(rng, 9, 5, 1000), weight, np.full(9, -np.inf), capture), spec)
    refused = 0
    for _ in range(400):
        name = str(rng.choice([name for name, data in columns.items() if data]))
        damaged = bytearray(columns[name])
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        try:
            decode_signals(columns | {name: bytes(damaged)}, 10, spec)
        except ValueError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("mode", list(TargetMode))
def test_the_encoded_columns_are_those_of_the_schema(mode):
    capture = replace(EVERYTHING, mode=mode, draws=8)
    weight = np.tile(np.log([[0.5, 0.125, 0.125, 0.125, 0.125]]), (9, 1))
    rng = np.random.default_rng(0)
    original = signals_of(distinct_ids(rng, 9, 5, 1000), weight, np.full(9, -np.inf), capture, rng)
    declared = {column.name for column in spec_of(capture).columns} - {"loss_mask", "byte_end"}
    assert set(encode_signals(original, spec_of(capture))) == declared


def test_equal_signals_give_equal_bytes():
    assert encode_signals(some_signals(), spec_of(EVERYTHING)) == encode_signals(some_signals(), spec_of(EVERYTHING))
