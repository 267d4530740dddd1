"""Comparison of two Parquet readers that share no code: fastparquet must read the values that pyarrow reads.

fastparquet is an optional extra (`pip install 'stillhouse[verify]'`). Only `verify` may import it.
"""

import importlib.util
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa


def fastparquet_installed() -> bool:
    """Return whether fastparquet can be imported."""
    return importlib.util.find_spec("fastparquet") is not None


def reader_mismatches(data: bytes, tables: list[pa.Table]) -> Iterator[tuple[int | None, int | None, str]]:
    """Yield (row group, row in the shard, message) wherever fastparquet reads another value.

    `data` is a complete Parquet file, `tables` are its row groups as pyarrow reads them.
    """
    import fastparquet

    try:
        file = fastparquet.ParquetFile(io.BytesIO(data))
        frames = [file[number].to_pandas() for number in range(len(file.row_groups))] if tables else []
    except Exception as error:  # any failure to read what pyarrow reads is a mismatch
        yield None, None, f"fastparquet cannot read it: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return
    if len(frames) != len(tables):
        yield None, None, f"fastparquet reads {len(frames)} row groups, pyarrow {len(tables)}"
        return
    first_row = 0
    for number, (frame, table) in enumerate(zip(frames, tables, strict=True)):
        for row, message in _compare(frame, table):
            yield number, None if row is None else first_row + row, message
        first_row += table.num_rows


def _compare(frame: Any, table: pa.Table) -> Iterator[tuple[int | None, str]]:
    if list(frame.columns) != table.column_names or len(frame) != table.num_rows:
        yield None, f"fastparquet reads {frame.shape} rows and columns, pyarrow {table.shape}"
        return
    for name in table.column_names:
        for row, (other, value) in enumerate(zip(frame[name], table.column(name).to_pylist(), strict=True)):
            if not _equal(other, value):
                yield row, f"column {name}: fastparquet and pyarrow read different values"


def _equal(fastparquet_value: Any, pyarrow_value: Any) -> bool:
    if isinstance(pyarrow_value, list):
        return bool(np.array_equal(fastparquet_value, pyarrow_value))
    if pyarrow_value is None:
        return fastparquet_value is None or fastparquet_value != fastparquet_value
    return bool(fastparquet_value == pyarrow_value)
