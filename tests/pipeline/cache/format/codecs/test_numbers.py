"""Scalars, counts and states for any shape and any bits: each codec at its stated precision."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.bfloat16 import to_bfloat16, to_float32
from pipeline.cache.format.codecs.hidden import decode_bfloat16, decode_int8, encode_bfloat16, encode_int8
from pipeline.cache.format.codecs.scalars import decode_counts, decode_float16, encode_counts, encode_float16

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 9))
BITS = SHAPES.flatmap(lambda shape: arrays(np.uint16, shape))
"""States of any bits: infinities and NaN among them."""
FINITE = SHAPES.flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.floats(-(2.0**100), 2.0**100, width=32))
).map(to_bfloat16)
LOGS = st.one_of(st.just(-np.inf), st.floats(-65_000.0, 0.0, width=32))


@settings(max_examples=60, deadline=None)
@given(BITS)
def test_bfloat16_states_of_any_bits_are_decoded_without_loss(state_TD):
    assert (decode_bfloat16(encode_bfloat16(state_TD), *state_TD.shape) == state_TD).all()


@settings(max_examples=60, deadline=None)
@given(FINITE)
def test_int8_states_are_within_half_a_scale_of_their_channel_and_a_rounding(state_TD):
    exact_TD = to_float32(state_TD).astype(np.float64)
    got_TD = to_float32(decode_int8(encode_int8(state_TD), *state_TD.shape)).astype(np.float64)
    half_scale_D = np.abs(exact_TD).max(axis=0) / 254
    least = 2.0**-120  # where float32 runs out of bits for a scale
    assert (np.abs(got_TD - exact_TD) <= 1.001 * half_scale_D + np.abs(got_TD) * 2**-8 + least).all()


@settings(max_examples=60, deadline=None)
@given(SHAPES.flatmap(lambda shape: arrays(np.float32, shape, elements=LOGS)))
def test_float16_scalars_are_decoded_to_the_stated_precision(values):
    got = decode_float16(encode_float16(values), values.shape)
    assert (np.isneginf(got) == np.isneginf(values)).all()
    np.testing.assert_allclose(got, values, rtol=2**-11, atol=3e-8)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2**20), st.data())
def test_counts_are_decoded_without_loss(full, data):
    count_T = np.array(data.draw(st.lists(st.integers(0, full), min_size=1, max_size=30)))
    decoded = decode_counts(encode_counts(count_T, full), len(count_T), full)
    assert ((full if decoded is None else decoded) == count_T).all()
    assert (decoded is None) == bool((count_T == full).all())


def test_counts_that_are_too_many_or_too_large_are_refused():
    with pytest.raises(ValueError, match="expected 3 counts of at most 5"):
        decode_counts(bytes([1, 2]), 3, 5)
    with pytest.raises(ValueError, match="expected 2 counts of at most 5"):
        decode_counts(bytes([1, 6]), 2, 5)
