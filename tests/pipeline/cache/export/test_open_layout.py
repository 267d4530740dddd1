import json
from dataclasses import asdict

import numpy as np
import pytest

from pipeline.bfloat16 import to_bfloat16
from pipeline.cache.export.open_layout import export_cache
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage.store import Store
from pipeline.errors import StorageError, UsageError

SETTINGS = {"hidden_layers": [0, -1], "temperatures": [1.0, 2.0], "any_temperature": True, "boundary": True}


@pytest.fixture
def exported(make_cache, tmp_path):
    store = make_cache(**SETTINGS)
    return list(CacheReader.open(store).rows()), tmp_path / "open", export_cache(store, tmp_path / "open")


def expected_values(row, position):
    signals = row.signals
    return {
        "label_id": int(row.sequence.input_ids_N[position + 1]),
        "token_id": int(row.sequence.input_ids_N[position]),
        "entropy": float(signals.entropy_T[position]),
        "label_logprob": float(signals.label_logprob_T[position]),
        "tail_logmass": float(signals.tail_logmass_T[position]),
        "boundary_logmass": float(signals.boundary_logmass_T[position]),
        "entry_id": signals.entry_id_TK[position].tolist(),
        "entry_logweight": signals.entry_logweight_TK[position].tolist(),
        "log_partition": signals.log_partition_TC[position].tolist(),
        "tail_shape": signals.tail_shape_T3[position].tolist(),
    }


def query(sql):
    """Run a query with DuckDB and return its records."""
    import duckdb

    with duckdb.connect() as connection:
        result = connection.execute(sql)
        names = [column[0] for column in result.description]
        return [dict(zip(names, values, strict=True)) for values in result.fetchall()]


def test_duckdb_reads_every_value(exported):
    rows, folder, counts = exported
    records = query(f"select * from '{folder}/positions/*.parquet' order by sequence_id, position")
    expected_records = [
        (row.sequence.sequence_id, position, expected_values(row, position))
        for row in sorted(rows, key=lambda row: row.sequence.sequence_id)
        for position in range(len(row.signals.entropy_T))
    ]
    assert len(records) == len(expected_records) == counts.positions
    for record, (sequence_id, position, expected) in zip(records, expected_records, strict=True):
        assert (record["sequence_id"], record["position"]) == (sequence_id, position)
        assert {name: record[name] for name in expected} == expected


def test_duckdb_can_aggregate_lists(exported):
    rows, folder, _ = exported
    mass = "list_sum(list_transform(entry_logweight, lambda w: exp(w)))"
    (record,) = query(f"select avg({mass}) as mass from '{folder}/positions/*.parquet'")
    masses_T = np.concatenate([np.exp(row.signals.entry_logweight_TK).sum(axis=1) for row in rows])
    assert record["mass"] == pytest.approx(masses_T.mean())


def test_the_readme_explains_every_column(exported):
    import pyarrow.parquet

    _, folder, _ = exported
    readme = (folder / "README.md").read_text()
    for table in ("sequences", "positions"):
        names = pyarrow.parquet.read_schema(folder / table / "train-00000.parquet").names
        self_evident = {"sequence_id", "document_id", "domain", "split", "audited", "position", "is_label"}
        explained_names = {name for name in names if f"`{name.split('_')[0]}_*`" in readme or f"`{name}`" in readme}
        assert set(names) - explained_names <= self_evident | {"byte_start", "input_ids"}


def test_polars_reads_the_positions(exported):
    polars = pytest.importorskip("polars")
    _, folder, counts = exported
    frame = polars.read_parquet(folder / "positions" / "*.parquet")
    assert len(frame) == counts.positions
    assert frame["entry_id"].list.len().max() == 8


@pytest.mark.slow
def test_datasets_loads_the_folder_by_its_front_matter(exported, tmp_path):
    import datasets

    rows, folder, counts = exported
    settings = {"cache_dir": str(tmp_path / "hf")}
    positions = datasets.load_dataset(str(folder), "positions", **settings)
    assert set(positions) == {"train", "held_out"}
    assert sum(len(part) for part in positions.values()) == counts.positions
    sequences = datasets.load_dataset(str(folder), "sequences", split="held_out", **settings)
    held_out = [row for row in rows if row.sequence.split == "held_out"]
    assert sequences["sequence_id"][:] == [row.sequence.sequence_id for row in held_out]
    assert sequences[0]["input_ids"] == held_out[0].sequence.input_ids_N.tolist()
    assert sequences[0]["loss_mask"] == held_out[0].sequence.loss_mask_N.tolist()
    assert sequences[0]["byte_end"] == held_out[0].sequence.byte_end_N.tolist()


def test_pandas_and_fastparquet_read_the_hidden_states(exported):
    import fastparquet
    import pandas

    rows, folder, _ = exported
    for engine in ("pyarrow", "fastparquet"):
        path = folder / "positions" / "train-00000.parquet"
        frame = pandas.read_parquet(path) if engine == "pyarrow" else fastparquet.ParquetFile(path).to_pandas()
        bits = to_bfloat16(np.asarray(frame["hidden_4_normed"].iloc[0], np.float32))
        assert bits.tolist() == rows[0].signals.hidden_TLD[0, 1].tolist()
        assert np.asarray(frame["entry_id"].iloc[3]).tolist() == rows[0].signals.entry_id_TK[3].tolist()


@pytest.mark.parametrize("mode", ["topp", "unbiased", "sampled"])
def test_lists_hold_only_kept_entries(make_cache, tmp_path, mode):
    import pandas

    store = make_cache(mode=mode)
    export_cache(store, tmp_path / "open")
    frame = pandas.concat(pandas.read_parquet(path) for path in sorted((tmp_path / "open/positions").iterdir()))
    assert all(np.isfinite(weights).all() and len(weights) for weights in frame["entry_logweight"])
    assert (frame["entry_id"].map(len) == frame["entry_logweight"].map(len)).all()


def test_exporting_again_gives_the_same_files_and_refuses_other_ones(make_cache, exported, tmp_path):
    _, folder, counts = exported
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert export_cache(make_cache(**SETTINGS), folder) == counts
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (folder / "other.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"expected an empty folder, found other\.txt"):
        export_cache(make_cache(**SETTINGS), folder)


def test_an_export_can_be_written_to_any_storage(make_cache):
    counts = export_cache(make_cache(), "memory://export-test")
    assert len(Store.open("memory://export-test").list()) == counts.files + 1
    assert "sequences" in str(counts)
    assert json.loads(json.dumps(asdict(counts)))["folder"] == "memory://export-test"


def test_a_folder_that_is_no_cache_cannot_be_exported(tmp_path):
    with pytest.raises(StorageError, match="expected a cache"):
        export_cache(tmp_path, tmp_path / "open")
