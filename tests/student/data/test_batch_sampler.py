import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import RecipeError
from student.data.batch_sampler import SHUFFLE_UNITS, BatchSampler


def sampler_of(lengths, *, unit_sequences=8, **changes):
    values = {"seed": 3, "tokens_per_step": 64, "tokens_per_batch": 32, "epochs": 2.0} | changes
    units = [i // unit_sequences for i in range(len(lengths))]
    return BatchSampler(lengths, units, **values)


LENGTHS = st.lists(st.integers(2, 32), min_size=1, max_size=120)


@given(LENGTHS, st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_every_epoch_holds_every_sequence_once_and_no_step_is_too_large(lengths, seed):
    steps = list(sampler_of(lengths, seed=seed))
    for epoch in (0, 1):
        seen = [i for step in steps if step.epoch == epoch for batch in step.micro_batches for i in batch]
        assert sorted(seen) == list(range(len(lengths)))
    for step in steps:
        assert sum(lengths[i] for batch in step.micro_batches for i in batch) <= 64
        assert all(0 < sum(lengths[i] for i in batch) <= 32 for batch in step.micro_batches)


@given(LENGTHS, st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_sequences_yields_each_sequence_of_the_run_once_in_training_order(lengths, max_steps):
    sampler = sampler_of(lengths, max_steps=max_steps)
    read = [i for step in sampler for batch in step.micro_batches for i in batch]
    assert list(sampler.sequences()) == list(dict.fromkeys(read))


@given(LENGTHS, st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
@settings(max_examples=60, deadline=None)
def test_any_number_of_ranks_covers_the_same_micro_batches(lengths, world):
    sampler = sampler_of(lengths)
    for step in sampler:
        parts = [batch for rank in range(world) for batch in step.for_rank(rank, world)]
        assert dict(parts) == dict(enumerate(step.micro_batches))
        assert max(len(step.for_rank(rank, world)) for rank in range(world)) == step.micro_steps_per_rank(world)


def test_a_step_does_not_depend_on_which_steps_were_computed_before():
    lengths = list(np.random.default_rng(0).integers(2, 33, 200))
    forwards = list(sampler_of(lengths))
    backwards = [sampler_of(lengths)[number] for number in reversed(range(len(forwards)))]
    assert forwards == backwards[::-1]


def test_epochs_and_seeds_change_the_order():
    lengths = [8] * 200
    orders = {
        tuple(i for step in sampler_of(lengths, epochs=1.0, seed=seed) for b in step.micro_batches for i in b)
        for seed in range(5)
    }
    assert len(orders) == 5
    steps = list(sampler_of(lengths))
    first, second = ([s.micro_batches for s in steps if s.epoch == epoch] for epoch in (0, 1))
    assert first != second


def test_fractional_epochs_and_max_steps_set_the_number_of_steps():
    epoch_steps = len(sampler_of([8] * 80, epochs=1.0))
    assert len(sampler_of([8] * 80, epochs=1.5)) == epoch_steps + epoch_steps // 2
    assert len(sampler_of([8] * 80, epochs=3.0, max_steps=7)) == 7
    assert len(sampler_of([8] * 80, epochs=1.0, max_steps=10_000)) == epoch_steps


def test_sequences_are_shuffled_within_a_window_of_units():
    sampler = sampler_of([8] * (8 * SHUFFLE_UNITS * 4), epochs=1.0)
    sequence = [i for step in sampler for batch in step.micro_batches for i in batch]
    window = 8 * SHUFFLE_UNITS
    for start in range(0, len(sequence), window):
        assert len({i // 8 for i in sequence[start : start + window]}) == SHUFFLE_UNITS


def test_a_seed_gives_the_same_steps_on_every_machine():
    steps = list(sampler_of([5, 9, 14, 20, 7, 30, 2, 11], unit_sequences=2, epochs=1.0))
    assert [step.micro_batches for step in steps] == [((5, 6), (3, 7)), ((2, 1, 4), (0,))]


def test_a_sequence_longer_than_a_micro_batch_is_refused():
    with pytest.raises(RecipeError, match=r"tokens_per_batch: expected at least the longest sequence \(33 tokens\)"):
        sampler_of([8, 33])


def test_a_cache_without_training_sequences_is_refused():
    with pytest.raises(RecipeError, match="no training sequences"):
        sampler_of([])
