"""Encodes the rows of a unit as one Parquet file in memory."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from pipeline.cache.format.codecs import encode_sequence, encode_signals
from pipeline.cache.format.parquet import to_parquet
from pipeline.cache.format.schema import UNCOMPRESSED_COLUMNS, ShardSpec, arrow_schema
from pipeline.contracts import ScoredSequence

ROW_GROUP_BYTES = 128 << 20


def encode_shard(rows: Sequence[ScoredSequence], spec: ShardSpec, *, row_group_bytes: int = ROW_GROUP_BYTES) -> bytes:
    """Return the Parquet file: row groups of one row or of at most `row_group_bytes`, page checksums, zstd.

    Equal rows give equal bytes. Raises ValueError if a row's signals do not have the spec's shapes.
    """
    schema = arrow_schema(spec)
    encoded = (encode_sequence(row.sequence) | encode_signals(row.signals, spec) for row in rows)
    tables = (pa.Table.from_pylist(group, schema=schema) for group in _groups(encoded, row_group_bytes))
    return to_parquet(tables, schema, UNCOMPRESSED_COLUMNS)


def _groups(rows: Iterable[dict[str, Any]], max_bytes: int) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        row_bytes = _bytes_of(row)
        if group and size + row_bytes > max_bytes:
            yield group
            group, size = [], 0
        group.append(row)
        size += row_bytes
    if group:
        yield group


def _bytes_of(row: dict[str, Any]) -> int:
    """Return about the bytes before compression; the columns that are not counted take a few dozen."""
    return int(row["input_ids"].nbytes) + sum(len(value) for value in row.values() if isinstance(value, bytes))
