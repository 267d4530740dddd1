"""One quarantine entry per sequence, under its id."""

import pytest

from pipeline.cache import quarantine
from pipeline.cache.storage.store import Store
from pipeline.errors import DamageError, StorageError


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path)


def test_entries_are_sorted_and_the_first_reason_is_kept(store):
    quarantine.record(store, "b", "train-00001", "the engine died on it", "CUDA error:\n  out of memory")
    quarantine.record(store, "a", "train-00000", "not finite", "nan")
    quarantine.record(store, "b", "train-00001", "another reason", "")
    first, second = quarantine.entries(store)
    assert (first.sequence_id, second.sequence_id) == ("a", "b")
    assert second == quarantine.QuarantineEntry(
        "b", "train-00001", "the engine died on it", "CUDA error: out of memory"
    )


def test_no_entries_is_an_empty_list(store):
    assert quarantine.entries(store) == []


def test_an_id_that_cannot_be_a_file_name_is_refused(store):
    with pytest.raises(StorageError, match=r"expected 1\.\.128 of"):
        quarantine.record(store, "../../etc/cron.d/x", "train-00000", "r", "m")


def test_an_edited_entry_is_damage(store):
    quarantine.record(store, "a", "train-00000", "r", "m")
    store.put("quarantine/a.json", b'{"sequence_id": "a"}')
    with pytest.raises(DamageError, match=r"quarantine/a\.json: invalid content"):
        quarantine.entries(store)
