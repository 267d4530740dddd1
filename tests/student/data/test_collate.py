import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.errors import AdmissionError
from student.data.collate import CollateSpec, collate
from student.data.dataset import CacheDataset, make_batch_sampler
from student.data.prefetch import PrefetchLoader
from student.loop.worker_group import WorkerGroup
from student.training_job import TrainingJob


@pytest.fixture
def job(small_run):
    return TrainingJob(small_run.recipe(), "student")


def spec_of(job, **changes):
    return CollateSpec(**{"shards": {"dummy": job.caches()[0].spec}} | changes)


def loaded_steps(job, *, rank=0, world=1, first_step=0):
    dataset = CacheDataset(job.caches(), "train")
    sampler = make_batch_sampler(job, dataset)
    loader = PrefetchLoader(dataset, sampler, spec_of(job), WorkerGroup(rank, world), first_step, job.seed)
    try:
        return list(loader)
    finally:
        loader.close()


def test_a_micro_batch_concatenates_sequences_and_restarts_positions(job):
    dataset = CacheDataset(job.caches(), "train")
    batch = collate([dataset[3], dataset[0], dataset[7]], spec_of(job), number=0, seed=0)
    start = row = 0
    for index in (3, 0, 7):
        sequence = dataset[index][0].sequence
        length = len(sequence.input_ids_N)
        assert batch.input_ids_N[start : start + length].tolist() == sequence.input_ids_N.tolist()
        assert batch.position_ids_N[start : start + length].tolist() == list(range(length))
        assert batch.row_T[row : row + length - 1].tolist() == list(range(start, start + length - 1))
        labels = batch.targets.label_T[row : row + length - 1]
        assert labels.tolist() == sequence.input_ids_N[1:].tolist()
        assert batch.targets.weight_T[row : row + length - 1].tolist() == sequence.loss_mask_N[1:].tolist()
        start, row = start + length, row + length - 1
    assert len(batch.row_T) == row == batch.targets.rows
    assert batch.tokens == start


def test_targets_equal_the_cached_signals(job):
    dataset = CacheDataset(job.caches(), "train")
    batch = collate([dataset[1], dataset[2]], spec_of(job, hidden=True), number=0, seed=0)
    signals = [dataset[index][0].signals for index in (1, 2)]
    for name in ("entry_id_TK", "entry_logweight_TK", "tail_logmass_T"):
        expected = np.concatenate([getattr(one, name) for one in signals])
        assert np.array_equal(getattr(batch.targets, name).numpy(), expected), name
    bits = batch.hidden_TLE.view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(bits, np.concatenate([one.hidden_TLD for one in signals]))


def test_a_control_reads_no_entries_and_no_hidden_states(job):
    batch = collate([CacheDataset(job.caches(), "train")[0]], spec_of(job, entries=False), number=0, seed=0)
    assert batch.targets.entry_id_TK.shape[1] == 0
    assert batch.hidden_TLE is None
    assert batch.targets.log_partition_T is None


def test_a_token_id_outside_the_vocabulary_is_refused_with_its_sequence(job):
    dataset = CacheDataset(job.caches(), "train")
    with pytest.raises(AdmissionError, match=rf"{dataset.sequence_id(0)}.*below the student's vocabulary 20"):
        collate([dataset[0]], spec_of(job, vocabulary=20), number=0, seed=0)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_together_read_what_one_rank_reads(job, world):
    alone = {
        (loaded.step.number, batch.number): batch.sequence_ids
        for loaded in loaded_steps(job)
        for batch in loaded.batches
    }
    shared = {}
    for rank in range(world):
        for loaded in loaded_steps(job, rank=rank, world=world):
            assert len(loaded.batches) == loaded.step.micro_steps_per_rank(world)
            for batch in loaded.batches:
                if batch.number is None:
                    assert batch.targets.weight_T.sum() == 0
                    assert batch.tokens == 0
                else:
                    shared[loaded.step.number, batch.number] = batch.sequence_ids
    assert shared == alone


def test_a_loader_that_starts_at_a_later_step_gives_the_same_steps(job):
    expected, later = loaded_steps(job)[4:], loaded_steps(job, first_step=4)
    assert [loaded.step for loaded in later] == [loaded.step for loaded in expected]
    for first, second in zip(later, expected, strict=True):
        for a, b in zip(first.batches, second.batches, strict=True):
            assert (a.seed, a.sequence_ids) == (b.seed, b.sequence_ids)
            assert torch.equal(a.input_ids_N, b.input_ids_N)
            assert torch.equal(a.targets.entry_logweight_TK, b.targets.entry_logweight_TK)


def test_every_sequence_of_the_split_is_read_once_an_epoch(job):
    seen = [name for loaded in loaded_steps(job) for batch in loaded.batches for name in batch.sequence_ids]
    assert sorted(seen) == sorted(row.sequence.sequence_id for row in job.caches()[0].rows("train"))


def test_an_error_of_the_background_thread_is_raised_in_the_training_thread(job):
    dataset = CacheDataset(job.caches(), "train")
    sampler = make_batch_sampler(job, dataset)
    loader = PrefetchLoader(dataset, sampler, spec_of(job, vocabulary=20), WorkerGroup(), 0, 0)
    with pytest.raises(AdmissionError):
        next(iter(loader))
    loader.close()


def test_close_ends_the_thread_of_a_loader_that_is_not_exhausted(job):
    dataset = CacheDataset(job.caches(), "train")
    loader = PrefetchLoader(dataset, make_batch_sampler(job, dataset), spec_of(job), WorkerGroup(), 0, 0)
    next(iter(loader))
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_the_cache_of_decoded_units_is_bounded(job, monkeypatch):
    from student.data import dataset as module

    monkeypatch.setattr(module, "CACHED_UNITS", 2)
    dataset = CacheDataset(job.caches(), "train")
    for index in range(len(dataset)):
        assert dataset[index][0].sequence.sequence_id == dataset.sequence_id(index)
        assert len(dataset._units) <= 2


def test_two_teachers_are_fused_into_one_target(empty_run):
    names = ("first", "second")
    teachers = [
        {"name": name, "model": "dummy", "engine": "dummy", "options": {"vocabulary": 300, "width": 16, "seed": seed}}
        for seed, name in enumerate(names)
    ]
    job = TrainingJob(empty_run.recipe(teachers=teachers), "student")
    empty_run.fill(job.recipe)
    caches = job.caches()
    dataset = CacheDataset(caches, "train")
    shards = dict(zip(names, (cache.spec for cache in caches), strict=True))
    fused = collate([dataset[0], dataset[1]], CollateSpec(shards=shards), number=0, seed=0).targets
    for row in (0, 5, fused.rows - 1):
        ids = set()
        for at in (0, 1):
            signals = [dataset[index][at].signals for index in (0, 1)]
            ids |= set(np.concatenate([one.entry_id_TK for one in signals])[row].tolist())
        real = fused.entry_logweight_TK[row] > -torch.inf
        assert set(fused.entry_id_TK[row][real].tolist()) == ids
    mass_T = fused.entry_logweight_TK.exp().sum(dim=1) + fused.tail_logmass_T.exp()
    assert torch.allclose(mass_T, torch.ones_like(mass_T), atol=2e-2)


def test_a_sequence_that_one_cache_lacks_is_left_out(empty_run):
    teachers = [
        {"name": name, "model": "dummy", "engine": "dummy", "options": {"vocabulary": 300, "width": 16}}
        for name in ("first", "second")
    ]
    job = TrainingJob(empty_run.recipe(teachers=teachers), "student")
    empty_run.fill(job.recipe, lost_rows=1)
    caches = job.caches()
    full = [row.sequence.sequence_id for row in caches[1].rows("train")]
    dataset = CacheDataset(caches, "train")
    kept = [dataset.sequence_id(index) for index in range(len(dataset))]
    assert kept == full[1:]
    assert [entry.tokens for entry in dataset.index] == [
        len(dataset[i][0].sequence.input_ids_N) for i in range(len(kept))
    ]


def test_caches_with_different_tokens_under_one_id_are_refused(small_run, monkeypatch):
    job = TrainingJob(small_run.recipe(), "student")
    dataset = CacheDataset(job.caches() * 2, "train")
    one = dataset[0][0]
    other = replace(one, sequence=replace(one.sequence, input_ids_N=one.sequence.input_ids_N[::-1].copy()))
    dataset._units[1, dataset.index[0].unit_id] = [other]
    with pytest.raises(AdmissionError, match="the caches store different tokens"):
        dataset[0]
