"""Parquet as this project writes and reads it: in memory, page checksums both ways, every failure with its place."""

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DamageError

ZSTD_LEVEL = 1


class ShardDamage(DamageError):
    """Bytes of one file are not what was committed, as far down as it is known: `row_group` and `row` count from 0."""

    def __init__(self, shard: str, problem: str, row_group: int | None = None, row: int | None = None) -> None:
        places = [("row group", row_group), ("row", row)]
        where = "".join(f", {name} {number}" for name, number in places if number is not None)
        super().__init__(f"shard {shard}{where}: {problem}")
        self.shard, self.problem, self.row_group, self.row = shard, problem, row_group, row

    def __reduce__(self) -> tuple[type["ShardDamage"], tuple[str, str, int | None, int | None]]:
        """Rebuild from the arguments when the error crosses a process boundary."""
        return ShardDamage, (self.shard, self.problem, self.row_group, self.row)


@contextmanager
def writing(sink: pa.NativeFile, schema: pa.Schema, uncompressed: Collection[str] = ()) -> Iterator[pq.ParquetWriter]:
    """A writer whose bytes are a function of what is written (and of pyarrow's version).

    Setting up zstd takes 20 us a page on either side: `uncompressed` names the columns that it gains nothing on. They
    get no dictionary either, since fastparquet cannot read one that is empty and not compressed.
    """
    words = [field.name for field in schema if pa.types.is_string(field.type) and field.name not in uncompressed]
    compressed = {_path(field): "zstd" for field in schema if field.name not in uncompressed}
    writer = pq.ParquetWriter(
        sink,
        schema,
        compression={**dict.fromkeys(uncompressed, "none"), **compressed},
        compression_level=dict.fromkeys(compressed, ZSTD_LEVEL),
        use_dictionary=words,
        write_statistics=False,
        write_page_checksum=True,
    )
    with writer:
        yield writer


def to_parquet(row_groups: Iterable[pa.Table], schema: pa.Schema, uncompressed: Collection[str] = ()) -> bytes:
    """A whole file, one row group a table."""
    sink = pa.BufferOutputStream()
    with writing(sink, schema, uncompressed) as writer:
        for table in row_groups:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
    data: bytes = sink.getvalue().to_pybytes()
    return data


def open_parquet(data: bytes, shard: str) -> pq.ParquetFile:
    """The file behind its bytes, `shard` being its name in errors. Raises ShardDamage."""
    try:
        return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ShardDamage(shard, f"not a Parquet file that can be read: {_line(error)}") from error


def read_row_group(file: pq.ParquetFile, number: int, shard: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One row group with its page checksums verified, on this thread. Raises ShardDamage."""
    try:
        return file.read_row_group(number, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ShardDamage(shard, f"cannot be read: {_line(error)}", number) from error


def to_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Each row by column name: lists of integers as numpy arrays, everything else as Python's own."""
    names = table.column_names
    for batch in table.to_batches():
        for values in zip(*map(_values, batch.columns), strict=True):
            yield dict(zip(names, values, strict=True))


def _values(column: pa.Array) -> Iterable[Any]:
    if not isinstance(column, pa.ListArray):
        values: list[Any] = column.to_pylist()
        return values
    flat = column.values.to_numpy(zero_copy_only=False)
    return [flat[start:end].copy() for start, end in itertools.pairwise(column.offsets.tolist())]


def _path(field: pa.Field) -> str:
    """What Parquet calls the column."""
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else str(field.name)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
