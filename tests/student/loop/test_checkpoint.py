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
    clear,
    find_newest,
    load_exactly,
    prune,
    room_bytes,
    save_checkpoint,
)


def snapshot(step, value=None):
    generator = torch.Generator().manual_seed(step if value is None else value)
    weights = {f"layer.{i}": torch.randn(3, 5, generator=generator) for i in range(4)}
    weights["half"] = torch.randn(7, generator=generator).to(torch.bfloat16)
    optimizer = {f"exp_avg/layer.{i}": torch.randn(3, 5, generator=generator) for i in range(4)}
    optimizer["step/layer.0"] = torch.tensor(float(step))
    return Snapshot(step, {"epoch": 1, "seed": 2**40}, {"model": weights, "optimizer": optimizer})


def assert_same(got, expected):
    assert (got.step, got.state) == (expected.step, expected.state)
    assert {name: set(tensors) for name, tensors in got.sections.items()} == {
        name: set(tensors) for name, tensors in expected.sections.items()
    }
    for name, tensors in expected.sections.items():
        for key, tensor in tensors.items():
            assert torch.equal(got.sections[name][key], tensor)
            assert got.sections[name][key].dtype == tensor.dtype


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "run")


def file_of(store, step, name):
    return store.local_path() / f"checkpoints/step-{step:08d}/{name}"


def test_what_is_saved_is_found_again_bit_by_bit(store):
    save_checkpoint(store, snapshot(50))
    found = find_newest(store)
    assert_same(found.snapshot, snapshot(50))
    assert found.notes == ()


def test_an_object_store_does_as_well():
    store = Store.open("memory://stillhouse-checkpoints")
    save_checkpoint(store, snapshot(3))
    assert_same(find_newest(store).snapshot, snapshot(3))


def test_nothing_is_found_where_nothing_is(store):
    assert find_newest(store) == checkpoint.Found(None, ())


def test_tensors_are_split_over_files(store, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100)
    save_checkpoint(store, snapshot(1))
    assert file_of(store, 1, "model-00002.safetensors").exists()
    assert_same(find_newest(store).snapshot, snapshot(1))


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
def test_a_checkpoint_that_is_not_whole_is_passed_over_in_one_line(store, harm):
    save_checkpoint(store, snapshot(10))
    save_checkpoint(store, snapshot(20))
    harm(store)
    found = find_newest(store)
    assert_same(found.snapshot, snapshot(10))
    (note,) = found.notes
    assert "step-00000020" in note
    assert "passed over" in note
    assert "\n" not in note


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_only_the_newest_are_kept_and_older_halves_go(store):
    for step in (10, 20, 30, 40):
        save_checkpoint(store, snapshot(step))
    file_of(store, 10, "whole.json").unlink()
    prune(store, keep=2)
    assert sorted({path.split("/")[1] for path in store.list("checkpoints")}) == ["step-00000030", "step-00000040"]


def test_a_newer_half_is_no_reason_to_delete_the_only_whole_one(store):
    save_checkpoint(store, snapshot(10))
    save_checkpoint(store, snapshot(20))
    file_of(store, 20, "whole.json").unlink()
    prune(store, keep=1)
    assert_same(find_newest(store).snapshot, snapshot(10))


def test_clear_leaves_nothing(store):
    save_checkpoint(store, snapshot(10))
    clear(store)
    assert store.list("checkpoints") == []


def test_the_writer_saves_in_order_and_keeps_its_budget(store):
    writer = CheckpointWriter(store, keep=1, say=print)
    for step in (1, 2, 3):
        writer.save(snapshot(step), {"log.jsonl": f"{step}\n".encode()})
    writer.wait()
    writer.close()
    assert_same(find_newest(store).snapshot, snapshot(3))
    assert store.read("log.jsonl") == b"3\n"
    assert {path.split("/")[1] for path in store.list("checkpoints")} == {"step-00000003"}


def test_the_writer_says_what_went_wrong(tmp_path):
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter(Store.open(tmp_path / "file"), keep=1, say=print)
    writer.save(snapshot(1))
    with pytest.raises(StorageError, match="cannot write"):
        writer.wait()
    writer.close()


@pytest.fixture
def disk(store, monkeypatch):
    """A disk of so many bytes, of which the store takes its part."""

    def of(size_bytes):
        def room(_):
            return size_bytes - sum(store.size(path) for path in store.list())

        monkeypatch.setattr(checkpoint, "room_bytes", room)

    return of


def checkpoints_of(store):
    return sorted({path.split("/")[1] for path in store.list("checkpoints")})


def save_all(store, steps, keep):
    said = []
    writer = CheckpointWriter(store, keep, said.append)
    for step in steps:
        writer.save(snapshot(step), {"log.jsonl": f"{step}\n".encode()})
    writer.wait()
    writer.close()
    return said


def test_on_a_full_disk_a_checkpoint_is_left_out_in_one_line_and_the_newest_stays(store, disk):
    save_checkpoint(store, snapshot(1))
    disk(sum(store.size(path) for path in store.list()) + snapshot(1).size_bytes // 2)
    (line,) = save_all(store, [2], keep=2)
    assert "step-00000002: left out: it needs" in line
    assert checkpoints_of(store) == ["step-00000001"]
    assert store.read("log.jsonl") == b"2\n"


def test_where_the_disk_is_too_small_for_all_that_is_kept_older_ones_go_before_the_next_is_written(store, disk):
    save_checkpoint(store, snapshot(1))
    one = sum(store.size(path) for path in store.list())
    disk(3 * one)
    assert save_all(store, [2, 3, 4], keep=3) == []
    assert checkpoints_of(store) == ["step-00000003", "step-00000004"]


def test_the_room_of_a_folder_that_is_not_there_yet_is_that_of_its_disk(store):
    assert not store.local_path().exists()
    assert room_bytes(store) == pytest.approx(shutil.disk_usage("/").free, rel=1.0)
    assert room_bytes(Store.open("memory://stillhouse-room")) is None


def test_another_rank_loads_exactly_what_the_leading_one_has_found(store):
    for step in (10, 20):
        save_checkpoint(store, snapshot(step))
    file_of(store, 20, "whole.json").unlink()
    found = find_newest(store)
    assert_same(load_exactly(store, 10, found.marker_sha256), snapshot(10))
    with pytest.raises(TrainingError, match=r"step-00000010: expected the whole.json that rank 0 has read"):
        load_exactly(store, 10, "0" * 64)
    with pytest.raises(TrainingError, match=r"step-00000020: half written .*; ranks need one common storage"):
        load_exactly(store, 20, found.marker_sha256)


def test_nothing_but_safetensors_and_json_is_written(store):
    save_checkpoint(store, snapshot(10))
    names = [path.rsplit("/", 1)[1] for path in store.list("checkpoints")]
    assert sorted(names) == ["model-00000.safetensors", "optimizer-00000.safetensors", "whole.json"]
    marker = json.loads(store.read("checkpoints/step-00000010/whole.json"))
    assert marker["state"] == {"epoch": 1, "seed": 2**40}
