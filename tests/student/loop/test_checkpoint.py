import json
import shutil

import pytest
import torch

from pipeline.cache.storage.store import Store
from pipeline.errors import StorageError, TrainingError
from student.loop import checkpoint
from student.loop.checkpoint import (
    CheckpointWriter,
    Snapshot,
    delete_all_checkpoints,
    delete_old_checkpoints,
    free_disk_bytes,
    load_latest,
    load_step,
    save_checkpoint,
)


def snapshot(step, value=None):
    generator = torch.Generator().manual_seed(step if value is None else value)
    weights = {f"layer.{i}": torch.randn(3, 5, generator=generator) for i in range(4)}
    weights["bf16"] = torch.randn(7, generator=generator).to(torch.bfloat16)
    optimizer = {f"exp_avg/layer.{i}": torch.randn(3, 5, generator=generator) for i in range(4)}
    optimizer["step/layer.0"] = torch.tensor(float(step))
    return Snapshot(step, {"epoch": 1, "seed": 2**40}, {"model": weights, "optimizer": optimizer})


def assert_same(got, expected):
    assert (got.step, got.progress) == (expected.step, expected.progress)
    assert {name: set(tensors) for name, tensors in got.state_dicts.items()} == {
        name: set(tensors) for name, tensors in expected.state_dicts.items()
    }
    for name, tensors in expected.state_dicts.items():
        for key, tensor in tensors.items():
            assert torch.equal(got.state_dicts[name][key], tensor)
            assert got.state_dicts[name][key].dtype == tensor.dtype


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "run")


def file_of(store, step, name):
    return store.local_path() / f"checkpoints/step-{step:08d}/{name}"


def test_a_saved_checkpoint_is_loaded_bit_by_bit(store):
    save_checkpoint(store, snapshot(50))
    latest = load_latest(store)
    assert_same(latest.snapshot, snapshot(50))
    assert latest.warnings == ()


def test_a_checkpoint_in_an_object_store_is_loaded():
    store = Store.open("memory://stillhouse-checkpoints")
    save_checkpoint(store, snapshot(3))
    assert_same(load_latest(store).snapshot, snapshot(3))


def test_there_is_no_latest_checkpoint_in_an_empty_store(store):
    assert load_latest(store) == checkpoint.LatestCheckpoint(None, ())


def test_tensors_are_split_over_files(store, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100)
    save_checkpoint(store, snapshot(1))
    assert file_of(store, 1, "model-00002.safetensors").exists()
    assert_same(load_latest(store).snapshot, snapshot(1))


@pytest.mark.parametrize(
    "harm",
    [
        lambda store: file_of(store, 20, "whole.json").unlink(),
        lambda store: file_of(store, 20, "whole.json").write_text('{"step": 2'),
        lambda store: file_of(store, 20, "whole.json").write_text("[]"),
        lambda store: file_of(store, 20, "model-00000.safetensors").unlink(),
        lambda store: file_of(store, 20, "model-00000.safetensors").write_bytes(b"short"),
        lambda store: flip(file_of(store, 20, "optimizer-00000.safetensors")),
    ],
)
def test_an_incomplete_or_damaged_checkpoint_is_skipped_with_one_warning(store, harm):
    save_checkpoint(store, snapshot(10))
    save_checkpoint(store, snapshot(20))
    harm(store)
    latest = load_latest(store)
    assert_same(latest.snapshot, snapshot(10))
    (warning,) = latest.warnings
    assert "step-00000020" in warning
    assert "skipped" in warning
    assert "\n" not in warning


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_only_the_latest_are_kept_and_older_incomplete_ones_are_deleted(store):
    for step in (10, 20, 30, 40):
        save_checkpoint(store, snapshot(step))
    file_of(store, 10, "whole.json").unlink()
    delete_old_checkpoints(store, keep=2)
    assert sorted({path.split("/")[1] for path in store.list("checkpoints")}) == ["step-00000030", "step-00000040"]


def test_a_newer_incomplete_checkpoint_does_not_count_among_those_to_keep(store):
    save_checkpoint(store, snapshot(10))
    save_checkpoint(store, snapshot(20))
    file_of(store, 20, "whole.json").unlink()
    delete_old_checkpoints(store, keep=1)
    assert_same(load_latest(store).snapshot, snapshot(10))


def test_delete_all_checkpoints_leaves_no_file(store):
    save_checkpoint(store, snapshot(10))
    delete_all_checkpoints(store)
    assert store.list("checkpoints") == []


def test_the_writer_saves_in_order_and_keeps_only_the_latest(store):
    writer = CheckpointWriter(store, keep=1)
    for step in (1, 2, 3):
        writer.save(snapshot(step), {"log.jsonl": f"{step}\n".encode()})
    writer.wait()
    writer.close()
    assert_same(load_latest(store).snapshot, snapshot(3))
    assert store.read("log.jsonl") == b"3\n"
    assert {path.split("/")[1] for path in store.list("checkpoints")} == {"step-00000003"}


def test_the_writer_raises_the_error_of_its_thread(tmp_path):
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter(Store.open(tmp_path / "file"), keep=1)
    writer.save(snapshot(1))
    with pytest.raises(StorageError, match="cannot write"):
        writer.wait()
    writer.close()


@pytest.fixture
def disk(store, monkeypatch):
    """Sets the size of the disk, on which the store's files are the only ones."""

    def of(size_bytes):
        def free(_):
            return size_bytes - sum(store.size(path) for path in store.list())

        monkeypatch.setattr(checkpoint, "free_disk_bytes", free)

    return of


def checkpoints_of(store):
    return sorted({path.split("/")[1] for path in store.list("checkpoints")})


def save_all(store, steps, keep):
    writer = CheckpointWriter(store, keep)
    for step in steps:
        writer.save(snapshot(step), {"log.jsonl": f"{step}\n".encode()})
    writer.wait()
    writer.close()


def test_on_a_full_disk_a_checkpoint_is_skipped_with_one_warning_and_the_latest_is_kept(store, disk, caplog):
    save_checkpoint(store, snapshot(1))
    disk(sum(store.size(path) for path in store.list()) + snapshot(1).size_bytes // 2)
    save_all(store, [2], keep=2)
    (line,) = caplog.messages
    assert "step-00000002: skipped: expected" in line
    assert checkpoints_of(store) == ["step-00000001"]
    assert store.read("log.jsonl") == b"2\n"


def test_on_a_disk_too_small_for_keep_checkpoints_older_ones_are_deleted_first(store, disk, caplog):
    save_checkpoint(store, snapshot(1))
    one = sum(store.size(path) for path in store.list())
    disk(3 * one)
    save_all(store, [2, 3, 4], keep=3)
    assert caplog.messages == []
    assert checkpoints_of(store) == ["step-00000003", "step-00000004"]


def test_free_disk_bytes_of_a_missing_folder_are_those_of_its_disk(store):
    assert not store.local_path().exists()
    assert free_disk_bytes(store) == pytest.approx(shutil.disk_usage("/").free, rel=1.0)
    assert free_disk_bytes(Store.open("memory://stillhouse-free")) is None


def test_load_step_loads_only_what_rank_0_has_loaded(store):
    for step in (10, 20):
        save_checkpoint(store, snapshot(step))
    file_of(store, 20, "whole.json").unlink()
    latest = load_latest(store)
    assert_same(load_step(store, 10, latest.marker_sha256), snapshot(10))
    with pytest.raises(TrainingError, match=r"step-00000010: expected the whole.json that rank 0 has read"):
        load_step(store, 10, "0" * 64)
    with pytest.raises(TrainingError, match=r"step-00000020: incomplete .*; ranks need one shared storage"):
        load_step(store, 20, latest.marker_sha256)


def test_only_safetensors_and_json_are_written(store):
    save_checkpoint(store, snapshot(10))
    names = [path.rsplit("/", 1)[1] for path in store.list("checkpoints")]
    assert sorted(names) == ["model-00000.safetensors", "optimizer-00000.safetensors", "whole.json"]
    marker = json.loads(store.read("checkpoints/step-00000010/whole.json"))
    assert marker["state"] == {"epoch": 1, "seed": 2**40}
