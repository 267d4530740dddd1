"""bfloat16 conversions agree with torch's for all bits."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays

from pipeline.bfloat16 import to_bfloat16, to_float32


def test_all_bfloat16_values_convert_to_float32_exactly_and_back():
    bits = np.arange(2**16, dtype=np.uint16)
    values = to_float32(bits)
    np.testing.assert_array_equal(values, torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy())
    back = to_bfloat16(values)
    number = ~np.isnan(values)
    assert (back[number] == bits[number]).all()
    assert np.isnan(to_float32(back[~number])).all()


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=2)))
def test_float32_rounds_to_the_nearest_bfloat16_as_in_torch(values):
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(to_float32(to_bfloat16(values)), expected)
    np.testing.assert_array_equal(to_float32(to_bfloat16(values.T)), expected.T)
