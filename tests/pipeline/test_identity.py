import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.identity import canonical_json, differing_fields, fingerprint, sha256_file, token_digest, uniform

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def test_canonical_json_does_not_depend_on_key_order():
    assert canonical_json({"b": 1, "a": (2, 3)}) == canonical_json({"a": [2, 3], "b": 1}) == '{"a":[2,3],"b":1}'


def test_canonical_json_refuses_nan():
    with pytest.raises(ValueError):
        canonical_json({"loss": float("nan")})


def test_fingerprint_is_the_sha256_of_the_canonical_json():
    assert fingerprint({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()


def test_sha256_file_reads_more_than_one_block(tmp_path):
    data = bytes(range(256)) * 8192
    (tmp_path / "big").write_bytes(data)
    assert sha256_file(tmp_path / "big") == hashlib.sha256(data).hexdigest()


def test_token_digest_is_of_little_endian_int32_for_any_dtype_and_stride():
    expected = hashlib.sha256(b"\x01\0\0\0\x02\0\0\0").hexdigest()
    assert token_digest(np.array([1, 2], dtype=np.int64)) == expected
    assert token_digest(np.array([1, 9, 2], dtype=">i4")[::2]) == expected


def test_uniform_is_deterministic_and_uniform():
    draws = [uniform(0, f"document-{n}") for n in range(2000)]
    assert draws == [uniform(0, f"document-{n}") for n in range(2000)]
    assert 0.45 < np.mean(draws) < 0.55
    assert all(0 <= draw < 1 for draw in draws)


def test_differing_fields_are_named_by_their_path():
    got = {"teacher": {"revision": "a", "dtype": "bfloat16"}, "k": 64, "old": 1}
    expected = {"teacher": {"revision": "b", "dtype": "bfloat16"}, "k": 64}
    assert differing_fields(got, expected) == [
        "old: got 1, expected nothing",
        'teacher.revision: got "a", expected "b"',
    ]


def test_a_tuple_equals_the_list_as_which_it_was_stored():
    assert differing_fields({"layers": [1, -1]}, {"layers": (1, -1)}) == []


@given(st.dictionaries(st.text(), json_values), st.dictionaries(st.text(), json_values))
def test_no_field_differs_exactly_when_the_fingerprints_are_equal(a, b):
    assert (differing_fields(a, b) == []) == (fingerprint(a) == fingerprint(b))
