import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.format.codecs import decode_sequence, encode_sequence
from pipeline.contracts import TokenSequence


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=70), st.integers(0, 10**9), st.booleans(), st.data())
def test_a_sequence_is_decoded_without_loss(lengths, byte_start, audited, data):
    mask = data.draw(st.lists(st.integers(0, 1), min_size=len(lengths), max_size=len(lengths)))
    sequence = TokenSequence(
        sequence_id="a",
        document_id="ü/1",
        domain=data.draw(st.none() | st.just("code")),
        split="held_out",
        input_ids_N=np.arange(len(lengths), dtype=np.int32) * 1000,
        loss_mask_N=np.array(mask, np.uint8),
        byte_end_N=(byte_start + np.cumsum(lengths)).astype(np.int32),
        byte_start=byte_start,
        audited=audited,
    )
    decoded = decode_sequence(encode_sequence(sequence))
    for name in ("input_ids_N", "loss_mask_N", "byte_end_N"):
        got, expected = getattr(decoded, name), getattr(sequence, name)
        assert got.dtype == expected.dtype
        assert (got == expected).all()
    plain = ("sequence_id", "document_id", "domain", "split", "byte_start", "audited")
    assert [getattr(decoded, name) for name in plain] == [getattr(sequence, name) for name in plain]


@pytest.mark.parametrize("name", ["loss_mask", "byte_end"])
def test_a_sequence_column_that_lacks_a_byte_is_refused(name):
    tokens = np.arange(9, dtype=np.int32)
    row = encode_sequence(TokenSequence("a", "d", None, "train", tokens, np.ones(9, np.uint8), tokens))
    with pytest.raises(ValueError):
        decode_sequence(row | {name: row[name][:-1]})
    with pytest.raises(ValueError, match="expected 8 ids, got 9"):
        decode_sequence(row | {"n_tokens": 8})
