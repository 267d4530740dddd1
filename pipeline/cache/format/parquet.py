"""Parquet files in memory, written and read with page checksums; damage is reported by row group and row."""

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DamageError

ZSTD_LEVEL = 1


class ShardDamage(DamageError):
    """A Parquet file differs from what was written; `row_group` and `row` count from 0 and are None if not known."""

    def __init__(self, shard: str, problem: str, row_group: int | None = None, row: int | None = None) -> None:
        numbers = [("row group", row_group), ("row", row)]
        position = "".join(f", {name} {number}" for name, number in numbers if number is not None)
        super().__init__(f"shard {shard}{position}: {problem}")
        self.shard, self.problem, self.row_group, self.row = shard, problem, row_group, row

    def __reduce__(self) -> tuple[type["ShardDamage"], tuple[str, str, int | None, int | None]]:
        """Pickle by arguments: the base class would be rebuilt from its message."""
        return ShardDamage, (self.shard, self.problem, self.row_group, self.row)


def to_parquet(row_groups: Iterable[pa.Table], schema: pa.Schema, uncompressed: Collection[str] = ()) -> bytes:
    """Return a Parquet file with one row group for each table. Equal tables give equal bytes in one pyarrow version.

    `uncompressed` names columns too small for zstd, whose setup takes 20 us a page for writer and reader alike. They
    are not dictionary-encoded either: fastparquet cannot read an empty uncompressed dictionary.
    """
    compressed = [field for field in schema if field.name not in uncompressed]
    codecs = {**dict.fromkeys(uncompressed, "none"), **{_parquet_path(field): "zstd" for field in compressed}}
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        schema,
        compression=codecs,
        compression_level={_parquet_path(field): ZSTD_LEVEL for field in compressed},
        use_dictionary=[field.name for field in compressed if pa.types.is_string(field.type)],
        write_statistics=False,
        write_page_checksum=True,
    ) as writer:
        for table in row_groups:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
    return bytes(sink.getvalue())


def open_parquet(data: bytes, shard: str) -> pq.ParquetFile:
    """Open a Parquet file from its bytes; `shard` is its name in errors. Raises ShardDamage."""
    try:
        return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ShardDamage(shard, f"expected a Parquet file, got: {_line(error)}") from error


def read_row_group(file: pq.ParquetFile, number: int, shard: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a row group on this thread and verify its page checksums. Raises ShardDamage."""
    try:
        return file.read_row_group(number, columns=columns, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ShardDamage(shard, f"cannot be read: {_line(error)}", number) from error


def column_bytes(metadata: pq.FileMetaData) -> dict[str, int]:
    """Return the compressed bytes of each column of a Parquet file."""
    total: dict[str, int] = {}
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    for column in (group.column(number) for group in groups for number in range(group.num_columns)):
        name = column.path_in_schema.partition(".")[0]
        total[name] = total.get(name, 0) + column.total_compressed_size
    return total


def to_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield each row as a dict: integer lists as numpy arrays, other values as Python objects."""
    names = table.column_names
    for batch in table.to_batches():
        for values in zip(*map(_values, batch.columns), strict=True):
            yield dict(zip(names, values, strict=True))


def _values(column: pa.Array) -> Iterable[Any]:
    if not isinstance(column, pa.ListArray):
        return list(column.to_pylist())
    flat = column.values.to_numpy(zero_copy_only=False)
    return [flat[start:end].copy() for start, end in itertools.pairwise(column.offsets.tolist())]


def _parquet_path(field: pa.Field) -> str:
    """Return the column's path in Parquet's schema."""
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else str(field.name)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
