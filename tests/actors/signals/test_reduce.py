import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.signals.reduce import eager_signals, reduce_rows
from actors.signals.reference import reference_signals
from actors.signals.rows import RowSignals
from actors.signals.sampling import row_uniforms
from pipeline.contracts import CaptureSpec, TargetMode

FIELDS = {
    "entry_id_RK": "entry_id_TK",
    "entry_logweight_RK": "entry_logweight_TK",
    "tail_logmass_R": "tail_logmass_T",
    "label_logprob_R": "label_logprob_T",
    "entropy_R": "entropy_T",
    "log_partition_RC": "log_partition_TC",
    "tail_shape_R3": "tail_shape_T3",
    "boundary_logmass_R": "boundary_logmass_T",
}


def spec_of(mode, **changes):
    values = {"k": 12, "draws": 20, "temperatures": (1.0, 2.0, 1.25), "any_temperature": True, "boundary": True}
    return CaptureSpec(mode=mode, **(values | changes))


def reduce(logits_TV, label_T, spec, name="s", reduction=reduce_rows):
    uniform = torch.from_numpy(row_uniforms(spec, name, len(logits_TV)))
    boundary = boundary_of(logits_TV.shape[1])
    return reduction(logits_TV, label_T, spec, uniform, torch.from_numpy(boundary) if spec.boundary else None)


def boundary_of(vocabulary):
    return np.arange(vocabulary) % 3 == 0


def reference(logits_TV, label_T, spec, name="s"):
    boundary = boundary_of(logits_TV.shape[1]) if spec.boundary else None
    return reference_signals(logits_TV.double().numpy(), label_T.numpy(), spec, name, boundary)


def some_logits(rows=40, vocabulary=211, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * scale
    return logits, torch.randint(vocabulary, (rows,), generator=generator)


def assert_same(got, expected, atol):
    for name, reference_name in FIELDS.items():
        a, b = getattr(got, name), getattr(expected, reference_name)
        assert (a is None) == (b is None), name
        if a is not None:
            np.testing.assert_allclose(a.double().numpy(), b.astype(np.float64), atol=atol, rtol=atol, err_msg=name)


@pytest.mark.parametrize("mode", list(TargetMode))
def test_float64_rows_equal_the_reference(mode):
    logits, label = some_logits()
    assert_same(reduce(logits, label, spec_of(mode)), reference(logits, label, spec_of(mode)), 2e-7)


@pytest.mark.parametrize("mode", [TargetMode.TOPK, TargetMode.TOPP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", [reduce_rows, eager_signals])
def test_model_dtypes_equal_the_reference_on_the_rounded_logits(mode, dtype, reduction):
    logits, label = some_logits(vocabulary=3001)
    logits = logits.to(dtype)  # bfloat16: hundreds of ties a row
    assert_same(
        reduce(logits, label, spec_of(mode), reduction=reduction), reference(logits, label, spec_of(mode)), 2e-5
    )


@pytest.mark.parametrize("reduction", [reduce_rows, eager_signals])
def test_ties_beyond_the_fetched_candidates_go_to_the_lower_id(reduction):
    logits, label = torch.zeros(3, 500), torch.tensor([1, 2, 3])
    logits[1, 400] = 1.0
    signals = reduce(logits, label, spec_of(TargetMode.TOPK, k=5), reduction=reduction)
    assert signals.entry_id_RK.tolist() == [[0, 1, 2, 3, 4], [400, 0, 1, 2, 3], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("gap", [60.0, 95.0, 400.0])
@pytest.mark.parametrize("reduction", [reduce_rows, eager_signals])
def test_tail_mass_is_accurate_where_one_minus_the_sum_is_zero(gap, reduction):
    logits, label = some_logits(vocabulary=300)
    logits[:, :12] += gap
    got, expected = (
        reduce(logits.float(), label, spec_of(TargetMode.TOPK), reduction=reduction),
        reference(logits.float(), label, spec_of(TargetMode.TOPK)),
    )
    assert torch.isfinite(got.tail_logmass_R).all()
    assert got.tail_logmass_R.max() < -gap / 2
    assert_same(got, expected, 5e-5)


def test_tokens_of_probability_zero_do_not_change_other_signals():
    logits, label = some_logits()
    logits[:, 100:] = -torch.inf
    label = label % 100
    for mode in TargetMode:
        assert_same(reduce(logits, label, spec_of(mode)), reference(logits, label, spec_of(mode)), 2e-7)


def test_fewer_than_k_possible_tokens_are_all_kept_exactly():
    logits, label = some_logits()
    logits[:, 7:] = -torch.inf
    signals = reduce(logits, label % 7, spec_of(TargetMode.UNBIASED))
    assert (torch.isfinite(signals.entry_logweight_RK).sum(1) == 7).all()
    torch.testing.assert_close(signals.entry_logweight_RK.exp().sum(1), torch.ones(40))
    assert (signals.entry_id_RK[:, 7:] == 0).all()


@pytest.mark.parametrize("mode", list(TargetMode))
def test_any_split_of_the_rows_gives_the_same_bytes(mode):
    logits, label = some_logits(rows=33)
    logits, spec = logits.float(), spec_of(mode)
    uniform = torch.from_numpy(row_uniforms(spec, "s", 33))
    unsplit = reduce_rows(logits, label, spec, uniform, torch.from_numpy(boundary_of(211)))
    for start, end in ((0, 1), (1, 10), (10, 33)):
        rows = slice(start, end)
        part = reduce_rows(logits[rows], label[rows], spec, uniform[rows], torch.from_numpy(boundary_of(211)))
        for field in RowSignals.__dataclass_fields__:
            assert torch.equal(getattr(part, field), getattr(unsplit, field)[rows]), field


def test_blocks_of_a_large_vocabulary_are_concatenated_in_order():
    logits, label = some_logits(rows=70, vocabulary=40_000)
    spec = spec_of(TargetMode.TOPK)
    assert_same(reduce(logits, label, spec), reference(logits, label, spec), 2e-7)


def test_random_numbers_of_a_row_depend_on_seed_and_sequence_only():
    spec = spec_of(TargetMode.SAMPLED)
    assert np.array_equal(row_uniforms(spec, "s", 9)[:4], row_uniforms(spec, "s", 4))
    assert not np.array_equal(row_uniforms(spec, "s", 4), row_uniforms(spec, "t", 4))
    assert not np.array_equal(row_uniforms(spec, "s", 4), row_uniforms(spec_of(TargetMode.SAMPLED, seed=1), "s", 4))


@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(1, 30),
    scale=st.sampled_from([0.0, 0.1, 1.0, 5.0, 20.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_unbiased_rows_hold_k_distinct_entries_that_sum_to_one(k, scale, dtype, seed):
    logits, label = some_logits(rows=16, vocabulary=64, scale=scale, seed=seed)
    spec = spec_of(TargetMode.UNBIASED, k=k, seed=seed)
    signals = reduce(logits.to(dtype), label, spec)
    assert torch.isfinite(signals.entry_logweight_RK).all()
    assert all(len(set(row)) == k for row in signals.entry_id_RK.tolist())
    assert (signals.entry_logweight_RK.double().exp().sum(1) - 1).abs().max() < 3e-6
    assert torch.isneginf(signals.tail_logmass_R).all()
    assert (signals.entry_logweight_RK[:, 1:] <= signals.entry_logweight_RK[:, :-1]).all()


@pytest.mark.parametrize("mode", [TargetMode.UNBIASED, TargetMode.SAMPLED])
def test_mean_over_seeds_converges_to_the_distribution(mode):
    logits, _ = some_logits(rows=1, vocabulary=30, scale=1.5)
    rows, spec = 6000, spec_of(mode, k=8, draws=8)
    many = logits.expand(rows, -1)
    signals = reduce(many, torch.zeros(rows, dtype=torch.long), spec)
    mean = torch.zeros(30, dtype=torch.float64)
    mean.index_add_(0, signals.entry_id_RK.long().flatten(), signals.entry_logweight_RK.double().exp().flatten())
    p = torch.softmax(logits[0], 0)
    # A mean of 6,000 weights of at most t = 1/8: its standard error is below sqrt(p / 8 / 6000).
    assert ((mean / rows - p).abs() < 5 * (p / 8 / rows).sqrt() + 1e-9).all()


def test_sampling_without_random_numbers_is_refused():
    logits, label = some_logits()
    with pytest.raises(ValueError, match="uniform_RU"):
        reduce_rows(logits, label, spec_of(TargetMode.UNBIASED, boundary=False))
