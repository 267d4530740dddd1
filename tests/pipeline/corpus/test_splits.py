from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.splits import Splitter, hash_split


def test_hash_split_holds_out_the_requested_fraction_and_a_larger_one_holds_out_the_same_documents():
    ids = [f"doc-{n}" for n in range(4000)]
    tenth = {i for i in ids if hash_split(i, 0.1, 0) == "held_out"}
    fifth = {i for i in ids if hash_split(i, 0.2, 0) == "held_out"}
    assert 340 < len(tenth) < 460
    assert tenth < fifth
    assert tenth != {i for i in ids if hash_split(i, 0.1, 1) == "held_out"}


@given(
    st.lists(st.text(min_size=1), min_size=2, unique=True, max_size=12),
    st.floats(0.001, 0.999),
    st.integers(0, 3),
    st.randoms(),
)
def test_both_splits_have_a_document_and_do_not_depend_on_the_order(ids, held_out, seed, random):
    splitter = Splitter(ids, held_out, seed)
    splits = {i: splitter(i) for i in ids}
    assert set(splits.values()) == {"train", "held_out"}
    shuffled = Splitter(random.sample(ids, len(ids)), held_out, seed)
    assert {i: shuffled(i) for i in ids} == splits


def test_a_single_document_is_in_the_training_split():
    assert {Splitter([f"d{n}"], 0.9, 0)(f"d{n}") for n in range(20)} == {"train"}


def test_none_or_all_documents_can_be_held_out():
    ids = [f"d{n}" for n in range(20)]
    assert {Splitter(ids, 0.0, 0)(i) for i in ids} == {"train"}
    assert {Splitter(ids, 1.0, 0)(i) for i in ids} == {"held_out"}


def test_ids_are_read_only_until_both_splits_have_one():
    read = []

    def ids():
        for n in range(10_000):
            read.append(n)
            yield f"d{n}"

    Splitter(ids(), 0.5, 0)
    assert len(read) < 50
