"""A unit's rows as one Parquet file, in memory."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from pipeline.cache.format.codecs import encode_sequence, encode_signals
from pipeline.cache.format.parquet import to_parquet
from pipeline.cache.format.schema import NAMES, ShardSpec, arrow_schema
from pipeline.contracts import ScoredSequence

ROW_GROUP_BYTES = 128 << 20


def encode_shard(rows: Sequence[ScoredSequence], spec: ShardSpec, *, row_group_bytes: int = ROW_GROUP_BYTES) -> bytes:
    """The whole file: row groups of at most `row_group_bytes` (of at least one row), page checksums, zstd.

    The same rows give the same bytes. Raises ValueError where a row's signals are not of the spec's shape.
    """
    schema = arrow_schema(spec)
    encoded = (encode_sequence(row.sequence) | encode_signals(row.signals, spec) for row in rows)
    return to_parquet((_table(group, schema) for group in _groups(encoded, row_group_bytes)), schema, NAMES)


def _groups(rows: Iterable[dict[str, Any]], most_bytes: int) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        row_bytes = _bytes_of(row)
        if group and size + row_bytes > most_bytes:
            yield group
            group, size = [], 0
        group.append(row)
        size += row_bytes
    if group:
        yield group


def _bytes_of(row: dict[str, Any]) -> int:
    """Bytes before compression, near enough: what is neither bytes nor ids is a few dozen."""
    return int(row["input_ids"].nbytes) + sum(len(value) for value in row.values() if isinstance(value, bytes))


def _table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pydict({name: [row[name] for row in rows] for name in schema.names}, schema=schema)
