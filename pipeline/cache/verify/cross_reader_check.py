"""The second reader: fastparquet, which shares no code with pyarrow, must read every value alike.

It is an optional extra (`pip install 'stillhouse[verify]'`). Nothing but `verify` may depend on it.
"""

import importlib.util
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa


def installed() -> bool:
    """Whether fastparquet is there."""
    return importlib.util.find_spec("fastparquet") is not None


def disagreements(data: bytes, tables: list[pa.Table]) -> Iterator[tuple[int | None, int | None, str]]:
    """(row group, row in the shard, what differs) wherever fastparquet reads another value from a whole file.

    `tables` are the row groups as pyarrow has read them.
    """
    import fastparquet

    try:
        file = fastparquet.ParquetFile(io.BytesIO(data))
        groups = [file[number].to_pandas() for number in range(len(file.row_groups))] if tables else []
    except Exception as error:  # a second witness may fail in any way; each of them is a disagreement
        yield None, None, f"fastparquet cannot read it: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return
    if len(groups) != len(tables):
        yield None, None, f"fastparquet reads {len(groups)} row groups, pyarrow {len(tables)}"
        return
    first_row = 0
    for number, (group, table) in enumerate(zip(groups, tables, strict=True)):
        for row, message in _compare(group, table):
            yield number, None if row is None else first_row + row, message
        first_row += table.num_rows


def _compare(group: Any, table: pa.Table) -> Iterator[tuple[int | None, str]]:
    if list(group.columns) != table.column_names or len(group) != table.num_rows:
        yield None, f"fastparquet reads {group.shape} rows and columns, pyarrow {table.shape}"
        return
    for name in table.column_names:
        for row, (theirs, ours) in enumerate(zip(group[name], table.column(name).to_pylist(), strict=True)):
            if not _same(theirs, ours):
                yield row, f"column {name}: fastparquet and pyarrow read different values"


def _same(theirs: Any, ours: Any) -> bool:
    if isinstance(ours, list):
        return bool(np.array_equal(theirs, ours))
    if ours is None:
        return theirs is None or theirs != theirs
    return bool(theirs == ours)
