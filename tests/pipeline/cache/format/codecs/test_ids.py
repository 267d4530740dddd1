import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.format.codecs.ids import accumulate_rows, decode_rows, encode_rows, ids_of, rank_ids


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**20 - 1), max_size=300), st.integers(1, 2**20))
def test_ranks_are_a_bijection_of_the_vocabulary(values, modulus):
    ids = np.array(values, np.int32) % modulus
    common, ranks = rank_ids(ids)
    assert (ids_of(ranks[None], common)[0] == ids).all()
    assert len(set(common.tolist())) == len(common)
    assert set(common.tolist()) == {i for i in ids.tolist() if ids.tolist().count(i) > 1}


def test_repeated_ids_get_the_first_ranks():
    common, ranks = rank_ids(np.array([900, 7, 900, 7, 900, 900, 3, 12]))
    assert common.tolist() == [900, 7]
    assert ranks.tolist() == [0, 1, 0, 1, 0, 0, 3, 12]


def test_ids_displaced_by_common_ones_get_the_ranks_of_those():
    common, ranks = rank_ids(np.array([9, 9, 1, 1, 7, 7, 0, 2, 3]))
    assert common.tolist() == [1, 7, 9]
    assert ranks.tolist() == [2, 2, 0, 0, 1, 1, 7, 9, 3]


def random_rows(rng, rows, k, limit):
    """Rising ranks below `limit`; the last row has the highest possible."""
    ranks = np.stack([np.sort(rng.permutation(limit)[:k]) for _ in range(rows)])
    ranks[-1] = np.arange(limit - k, limit)
    return ranks.astype(np.uint32)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 70), st.sampled_from([256, 2**16, 2**18]), st.integers(0, 2**32 - 1))
def test_rows_are_decoded_from_their_gaps(rows, k, limit, seed):
    rng = np.random.default_rng(seed)
    planes = 1 if limit == 256 else 2 if limit == 2**16 else 3
    rank_TK = random_rows(rng, rows, k, limit)
    assert (decode_rows(encode_rows(rank_TK, None, planes), (rows, k), None) == rank_TK).all()
    valid_TK = np.arange(k) < rng.integers(0, k + 1, size=(rows, 1))
    decoded_TK = decode_rows(encode_rows(rank_TK, valid_TK, planes), (rows, k), valid_TK)
    assert (decoded_TK[valid_TK] == rank_TK[valid_TK]).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("width", [0, 1, 3, 4, 16, 50, 64, 128, 1024])
def test_accumulate_rows_equals_cumsum(dtype, width):
    value_TN = np.random.default_rng(width).integers(0, 64, size=(5, width)).astype(dtype)
    value_TN[:, -1:] = np.iinfo(dtype).max - value_TN[:, :-1].sum(axis=1, keepdims=True)
    summed_TN = value_TN.copy()
    accumulate_rows(summed_TN)
    assert (summed_TN == np.cumsum(value_TN, axis=1)).all()


@pytest.mark.parametrize("k", [3, 4, 64])
def test_gaps_that_overflow_two_bytes_are_refused(k):
    ranks = np.arange(2**16 - k, 2**16, dtype=np.uint32)[None]
    low, high = (np.frombuffer(plane, np.uint8).copy() for plane in encode_rows(ranks, None, 2))
    for place in range(1, k):
        changed = low.copy()
        changed[place] += 1
        with pytest.raises(ValueError, match="ranks of ids: expected less than 65536"):
            decode_rows([changed.tobytes(), high.tobytes()], (1, k), None)
