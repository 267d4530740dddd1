"""Rows read as written by row, unit, row group and column; damage is reported with its place."""

import dataclasses
import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache.commit import commit_unit
from pipeline.cache.description import write_cache_identity, write_teacher
from pipeline.cache.format.parquet import ShardDamage
from pipeline.cache.format.shard_writer import encode_shard
from pipeline.cache.lm_head import write_lm_head
from pipeline.cache.manifest import write_manifest
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage import layout
from pipeline.cache.storage.store import Store
from pipeline.cache.unit_list import write_units
from pipeline.contracts import LmHead
from pipeline.errors import DamageError, StorageError, UsageError


@pytest.fixture
def made(made_up):
    return made_up(hidden_layers=(2, -1))


@pytest.fixture
def store(tmp_path, made):
    store = Store.open(tmp_path / "cache")
    write_cache_identity(store, {"of": "made-up"})
    units = [made.unit(0), made.unit(1), made.unit(0, split="held_out")]
    write_units(store, units)
    write_teacher(store, made.teacher, made.spec)
    for unit in units:
        rows = made.rows(unit)
        commit_unit(store, unit.unit_id, encode_shard(rows, made.spec, row_group_bytes=6000), rows)
    write_manifest(store)
    return store


def test_rows_are_read_in_the_order_of_the_unit_list(store, made):
    reader = CacheReader.open(store.uri)
    assert reader.unit_ids() == ["train-00000", "train-00001", "held_out-00000"]
    expected = [row for unit_id in reader.unit_ids() for row in made.rows(reader.units.read(unit_id))]
    got = list(reader.rows())
    assert [row.sequence.sequence_id for row in got] == [row.sequence.sequence_id for row in expected]
    for read, written in zip(got, expected, strict=True):
        for field in dataclasses.fields(read.sequence):
            np.testing.assert_array_equal(getattr(read.sequence, field.name), getattr(written.sequence, field.name))
        decoded, encoded = (np.sort(row.signals.entry_id_TK, axis=1) for row in (read, written))
        np.testing.assert_array_equal(decoded, encoded)  # the codec may reorder values that it rounds alike
        np.testing.assert_allclose(read.signals.entropy_T, written.signals.entropy_T, rtol=1e-3)
        np.testing.assert_array_equal(read.signals.hidden_TLD, written.signals.hidden_TLD)
    assert len(list(reader.rows("held_out"))) == 4
    assert (reader.description, reader.spec) == (made.teacher, made.spec)


def test_a_shard_is_read_by_row_groups(store):
    reader = CacheReader.open(store)
    shard = reader.shard("train-00000")
    assert shard.row_groups > 1
    groups = [list(reader.unit_rows("train-00000", [number])) for number in range(shard.row_groups)]
    ids = [row.sequence.sequence_id for group in groups for row in group]
    assert ids == shard.sequence_ids()
    assert shard.first_row == np.cumsum([0, *map(len, groups)])[:-1].tolist()


def test_arrow_and_pandas_hold_the_same_rows(store):
    reader = CacheReader.open(store)
    batches = list(reader.batches(reader.unit_ids("train"), [0]))
    assert [batch.schema.names for batch in batches] == [reader.shard("train-00000").table(0).column_names] * 2
    table = reader.to_arrow(["train-00000"])
    assert table.column("sequence_id").to_pylist() == reader.shard("train-00000").sequence_ids()
    frame = reader.to_pandas(["train-00000", "held_out-00000"])
    rows = reader.read_unit("train-00000") + reader.read_unit("held_out-00000")
    assert frame["sequence_id"].tolist() == [row.sequence.sequence_id for row in rows]
    assert frame["entry_id"][5].shape == rows[5].signals.entry_id_TK.shape
    np.testing.assert_array_equal(frame["entry_id"][5], rows[5].signals.entry_id_TK)


def test_positions_are_arrow_batches_one_per_sequence(store):
    reader = CacheReader.open(store)
    rows = reader.read_unit("train-00001") + reader.read_unit("held_out-00000")
    batches = list(reader.positions(["train-00001", "held_out-00000"]))
    assert [batch.num_rows for batch in batches] == [len(row.signals.entropy_T) for row in rows]
    for batch, row in zip(batches, rows, strict=True):
        assert batch.column("label_id").to_pylist() == row.sequence.input_ids_N[1:].tolist()
        assert batch.column("entry_id").to_pylist() == row.signals.entry_id_TK.tolist()
        np.testing.assert_array_equal(batch.column("entropy"), row.signals.entropy_T)
    some = list(reader.positions(["train-00001"], [1]))
    assert some == batches[reader.shard("train-00001").first_row[1] :][: len(some)]


@pytest.mark.parametrize("number", [-1, 99])
def test_a_row_group_out_of_range_is_a_usage_error(store, number):
    reader = CacheReader.open(store)
    last = reader.shard("train-00000").row_groups - 1
    for read in (reader.to_pandas, reader.to_arrow, lambda *arguments: list(reader.positions(*arguments))):
        with pytest.raises(UsageError, match=rf"train-00000-.*expected a row group of 0\.\.{last}, got {number}"):
            read(["train-00000"], [0, number])


def test_torch_tensors_hold_the_rows_values(store):
    import torch

    reader = CacheReader.open(store)
    (tensors, *_), row = list(reader.tensors(["train-00001"])), reader.read_unit("train-00001")[0]
    assert tensors["hidden"].dtype == torch.bfloat16
    np.testing.assert_array_equal(tensors["hidden"].view(torch.uint16).numpy(), row.signals.hidden_TLD)
    np.testing.assert_array_equal(tensors["input_ids"].numpy(), row.sequence.input_ids_N)
    assert tensors["entry_logweight"].shape == row.signals.entry_logweight_TK.shape


def test_lengths_leave_out_quarantined_rows(store, made):
    reader = CacheReader.open(store)
    assert reader.lengths("train-00000").tolist() == [
        len(r.sequence.input_ids_N) for r in reader.read_unit("train-00000")
    ]
    unit = made.unit(2)
    rows = made.rows(unit)[1:]
    write_units(store, [made.unit(0), made.unit(1), unit])
    commit_unit(store, unit.unit_id, encode_shard(rows, made.spec), rows, quarantined=[unit.sequences[0].sequence_id])
    assert CacheReader.open(store).lengths(unit.unit_id).tolist() == [len(row.sequence.input_ids_N) for row in rows]


def test_a_unit_committed_after_the_manifest_can_be_read(store, made):
    reader = CacheReader.open(store)
    rows = made.rows(made.unit(9))
    with pytest.raises(StorageError, match="train-00009 is not committed"):
        reader.read_unit("train-00009")
    commit_unit(store, "train-00009", encode_shard(rows, made.spec), rows)
    assert len(reader.read_unit("train-00009")) == len(rows)
    assert "train-00009" not in reader.unit_ids()


def test_a_cache_without_manifest_is_read_by_its_commits_not_by_listing_data(store):
    store.delete("manifest.json")
    store.put("data/train-00007-0123456789abcdef.parquet", b"an orphan")
    assert CacheReader.open(store).unit_ids("train") == ["train-00000", "train-00001"]


def test_the_same_rows_give_the_same_bytes(made):
    rows = made.rows(made.unit(3))
    assert encode_shard(rows, made.spec) == encode_shard(rows, made.spec)
    assert encode_shard([], made.spec) == encode_shard([], made.spec)


def test_row_groups_are_filled_up_to_their_limit(made):
    rows = [row for number in range(4) for row in made.rows(made.unit(number))]
    file = pq.ParquetFile(pa.BufferReader(encode_shard(rows, made.spec, row_group_bytes=9000)))
    groups = [file.read_row_group(number) for number in range(file.num_row_groups)]
    sizes = [sum(map(bytes_of, group.to_pylist())) for group in groups]
    assert len(sizes) > 3
    assert all(size <= 9000 or group.num_rows == 1 for size, group in zip(sizes, groups, strict=True))
    following = [bytes_of(group.slice(0, 1).to_pylist()[0]) for group in groups[1:]]
    assert all(size + more > 9000 for size, more in zip(sizes, following, strict=False))
    assert sum(group.num_rows for group in groups) == len(rows)


def bytes_of(row) -> int:
    """Size of the ids and tensors of a stored row."""
    return 4 * len(row["input_ids"]) + sum(len(value) for value in row.values() if isinstance(value, bytes))


def test_a_unit_without_rows_has_a_shard(store, made):
    commit_unit(store, "train-00005", encode_shard([], made.spec), [], quarantined=["poison"])
    reader = CacheReader.open(store)
    assert reader.read_unit("train-00005") == []
    assert reader.shard("train-00005").lengths().tolist() == []


def test_one_flipped_bit_is_damage_reported_with_its_shard(store):
    reader = CacheReader.open(store)
    path = reader.commit("train-00000").file
    data = store.read(path)
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(data) * 8, 40).tolist():
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        store.put(path, bytes(flipped))
        with pytest.raises(ShardDamage, match=f"{path}: expected sha256"):
            reader.read_unit("train-00000")


def test_page_checksums_are_verified_even_without_the_sha256(store):
    reader = CacheReader.open(store, verify=False)
    path = reader.commit("train-00000").file
    data = bytearray(store.read(path))
    data[len(data) // 3] ^= 4
    store.put(path, bytes(data))
    with pytest.raises(ShardDamage, match="row group"):
        reader.read_unit("train-00000")


def test_ids_that_do_not_match_their_digest_are_reported_with_their_row(store, made):
    unit = made.unit(6)
    rows = made.rows(unit)
    table = pq.read_table(pa.BufferReader(encode_shard(rows, made.spec)))
    digests = table.column("input_digest").to_pylist()
    digests[2] = digests[1]
    index = table.schema.get_field_index("input_digest")
    table = table.set_column(index, table.schema.field(index), [digests])
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=2, write_page_checksum=True)
    commit_unit(store, unit.unit_id, sink.getvalue(), rows)
    with pytest.raises(ShardDamage, match=r"row group 1, row 2: input_ids of .* digest") as caught:
        CacheReader.open(store).read_unit(unit.unit_id)
    assert (caught.value.row_group, caught.value.row) == (1, 2)
    assert len(CacheReader.open(store, verify=False).read_unit(unit.unit_id)) == 4


def test_a_swapped_or_missing_shard_is_refused(store):
    reader = CacheReader.open(store)
    first, second = (reader.commit(unit_id).file for unit_id in ("train-00000", "train-00001"))
    store.put(first, store.read(second))
    with pytest.raises(ShardDamage):
        reader.read_unit("train-00000")
    store.delete(first)
    with pytest.raises(StorageError, match=f"cannot read .*{first}"):
        reader.read_unit("train-00000")


def test_the_lm_head_is_stored_once(store):
    rng = np.random.default_rng(1)
    head = LmHead(rng.integers(0, 2**16, (50, 4)).astype(np.uint16), np.ones(50, np.float32), 0.5, 30.0)
    assert CacheReader.open(store).lm_head() is None
    write_lm_head(store, head)
    write_lm_head(store, head)
    got = CacheReader.open(store).lm_head()
    np.testing.assert_array_equal(got.weight_VD, head.weight_VD)
    np.testing.assert_array_equal(got.bias_V, head.bias_V)
    assert (got.scale, got.soft_cap) == (0.5, 30.0)
    with pytest.raises(DamageError, match="got different ones"):
        write_lm_head(store, dataclasses.replace(head, scale=1.0))


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:-300] + b"\1" + d[-299:], lambda d: b""])
def test_a_damaged_lm_head_is_refused(store, damage):
    write_lm_head(store, LmHead(np.full((50, 4), 3, np.uint16)))
    store.put(layout.LM_HEAD, damage(store.read(layout.LM_HEAD)))
    with pytest.raises(DamageError, match=r"lm_head\.safetensors: invalid content"):
        CacheReader.open(store).lm_head()


def test_tokenizer_files_of_a_remote_cache_are_copied_to_a_local_folder(store, tmp_path):
    store.put("tokenizer/tokenizer.json", b"{}")
    assert CacheReader.open(store).tokenizer_dir() == store.local_path() / "tokenizer"
    remote = Store.open(f"memory://{tmp_path.name}")
    for path in store.list():
        remote.put(path, store.read(path))
    reader = CacheReader.open(remote)
    assert (reader.tokenizer_dir() / "tokenizer.json").read_bytes() == b"{}"
    assert len(reader.read_unit("train-00000")) == 4


def test_a_pickled_reader_keeps_its_snapshot(store, made):
    reader = CacheReader.open(store)
    assert len(reader.units.read("train-00000").sequences) == 4
    rows = made.rows(made.unit(2))
    commit_unit(store, "train-00002", encode_shard(rows, made.spec), rows)
    write_manifest(store)
    again = pickle.loads(pickle.dumps(reader))
    assert again.unit_ids() == reader.unit_ids()
    assert len(again.read_unit("train-00001")) == 4
    assert len(pickle.loads(pickle.dumps(reader.units))) == 3


def test_reading_holds_one_shard_at_a_time(tmp_path, made_up):
    made = made_up(hidden_layers=(0, 1, 2, 3))
    store = Store.open(tmp_path / "cache")
    write_cache_identity(store, {"of": "made-up"})
    write_teacher(store, made.teacher, made.spec)
    largest = 0
    for number in range(12):
        rows = made.rows(made.unit(number))
        commit_unit(store, f"train-{number:05d}", encode_shard(rows, made.spec), rows)
        largest = max(largest, CacheReader.open(store).shard(f"train-{number:05d}").table(0).nbytes)
    before = pa.total_allocated_bytes()
    allocated = [pa.total_allocated_bytes() - before for _ in CacheReader.open(store).rows()]
    assert len(allocated) == 48
    assert max(allocated) < 3 * largest, f"up to {max(allocated)} bytes of Arrow for shards of at most {largest}"


def test_the_example_in_the_readme_runs_and_every_module_is_listed(store):
    package = Path(layout.__file__).parent.parent
    text = (package / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    exec(code.replace("runs/quickstart/caches/smollm2", store.uri), {})
    modules = {f"`{file.name}`" for folder in (".", "*") for file in package.glob(f"{folder}/*.py")} - {"`__init__.py`"}
    assert {module for module in modules if module not in text} == set()
