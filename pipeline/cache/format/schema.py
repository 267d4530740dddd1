"""The schema of a shard: its columns and their codecs, derived from a `ShardSpec` and enough to decode the shard.

A shard has one row for each sequence. Scalars of a sequence are plain columns; every tensor is a little-endian
`binary` column, since pyarrow and fastparquet disagree silently on float16, nested and fixed-size lists but read
`binary` alike. A column's metadata declares codec, version, dtype and shape; the schema's metadata holds the spec.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from pipeline.contracts import CaptureSpec, TargetMode, TeacherDescription
from pipeline.errors import DamageError
from pipeline.identity import canonical_json

METADATA_KEY = b"stillhouse"
FORMAT = "stillhouse-shard/1"

PLAIN_COLUMNS = (
    ("sequence_id", pa.string()),
    ("document_id", pa.string()),
    ("domain", pa.string()),
    ("split", pa.string()),
    ("n_tokens", pa.int32()),
    ("byte_start", pa.int64()),
    ("input_ids", pa.list_(pa.int32())),
    ("input_digest", pa.string()),
    ("audited", pa.bool_()),
)

"""Columns of a row's sequence that are not binary, in file order."""
UNCOMPRESSED_COLUMNS = tuple(name for name, kind in PLAIN_COLUMNS if not pa.types.is_list(kind))
"""Plain columns with one value a row: too small to compress."""


@dataclass(frozen=True, slots=True)
class HiddenLayer:
    """A captured hidden layer: the residual stream after `index` decoder layers, after the final norm if `normed`."""

    index: int
    normed: bool

    @property
    def column(self) -> str:
        """Return the name of the layer's column."""
        return f"hidden_{self.index}{'_normed' if self.normed else ''}"


@dataclass(frozen=True, slots=True)
class Column:
    """A binary column: its codec with version, and the dtype and shape of the decoded tensor."""

    name: str
    codec: str
    dtype: str
    shape: str

    def field(self) -> pa.Field:
        """Return the Arrow field; codec, dtype and shape are one metadata entry, since footers are not compressed."""
        declaration = f"{self.codec} {self.dtype} [{self.shape}]"
        return pa.field(self.name, pa.binary(), nullable=False, metadata={"codec": declaration})


@dataclass(frozen=True)
class ShardSpec:
    """What determines the columns of a shard and their decoding: the capture spec and the teacher's sizes."""

    capture: CaptureSpec
    vocabulary: int
    """V: token ids are in 0..V-1."""
    hidden_width: int
    """D, the width of hidden states."""
    layers: int
    """Number of the teacher's decoder layers: the index of layer -1."""

    @classmethod
    def of(cls, capture: CaptureSpec, teacher: TeacherDescription) -> "ShardSpec":
        """Return the spec of a teacher's shards."""
        return cls(capture, teacher.vocabulary, teacher.hidden_width, teacher.layers)

    @classmethod
    def from_schema(cls, schema: pa.Schema) -> "ShardSpec":
        """Parse the spec from a schema's metadata. Raises DamageError if this release cannot decode the shard."""
        declaration = (schema.metadata or {}).get(METADATA_KEY)
        if declaration is None:
            raise DamageError(f"shard schema: expected metadata {METADATA_KEY.decode()!r}, got none")
        spec = _parse(declaration)
        _check_columns(schema, arrow_schema(spec))
        return spec

    @property
    def k(self) -> int:
        """Largest number of entries a row: the width of the decoded tensors."""
        return self.capture.k

    @cached_property
    def id_bytes(self) -> int:
        """Bytes of an id, or of a gap between two ids."""
        return max(1, (max(self.vocabulary - 1, 0).bit_length() + 7) // 8)

    @cached_property
    def hidden(self) -> tuple[HiddenLayer, ...]:
        """The captured layers, in the capture spec's order."""
        return tuple(
            HiddenLayer(self.layers if layer == -1 else layer, normed=layer == -1)
            for layer in self.capture.hidden_layers
        )

    @cached_property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures whose log-partition is stored: all but 1, where it is 0 by definition."""
        return tuple(t for t in self.capture.temperatures if t != 1.0)

    @property
    def has_tail(self) -> bool:
        """Whether a row has tail mass outside its entries; in the sampling modes the weights sum to 1."""
        return self.capture.mode in (TargetMode.TOPK, TargetMode.TOPP)

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """Binary columns, in file order."""
        return tuple(_columns(self))


def arrow_schema(spec: ShardSpec) -> pa.Schema:
    """Return the Arrow schema of a spec's shards, with the spec in its metadata."""
    plain = [pa.field(name, kind, nullable=name == "domain") for name, kind in PLAIN_COLUMNS]
    declaration = {"format": FORMAT, **asdict(spec), "hidden": [asdict(layer) for layer in spec.hidden]}
    metadata = {METADATA_KEY: canonical_json(declaration)}
    return pa.schema([*plain, *(column.field() for column in spec.columns)], metadata=metadata)


def parse_capture(record: Mapping[str, Any]) -> CaptureSpec:
    """Parse a capture spec from JSON, which holds tuples as lists and the mode as a string."""
    tuples = {name: tuple(record[name]) for name in ("temperatures", "hidden_layers")}
    return CaptureSpec(**{**record, **tuples, "mode": TargetMode(record["mode"])})


def _columns(spec: ShardSpec) -> Iterator[Column]:
    capture = spec.capture
    yield Column("loss_mask", "mask/1", "uint8", "N")
    yield Column("byte_end", "offsets/1", "int32", "N")
    yield Column("entry_count", "counts/1", "uint32", "T")
    for plane in range(spec.id_bytes):
        yield Column(f"common_id_{plane}", f"list-plane-{plane}/1", "int32", "common ids")
    for plane in range(spec.id_bytes):
        yield Column(f"entry_gap_{plane}", f"rank-gaps-plane-{plane}/2", "int32", f"T,{spec.k}")
    yield Column("entry_value", f"weights-{capture.mode}/1", "float32", f"T,{spec.k}")
    if capture.mode is TargetMode.UNBIASED:
        yield Column("entry_threshold", "float16/1", "float32", "T")
    if spec.has_tail:
        yield Column("entry_floor", "level/1", "uint8", "T")
        yield Column("tail_logmass", "float16/1", "float32", "T")
    yield Column("label_logprob", "float16/1", "float32", "T")
    yield Column("entropy", "float16/1", "float32", "T")
    if spec.temperatures:
        yield Column("log_partition", "float16/1", "float32", f"T,{len(spec.temperatures)}")
    if capture.any_temperature:
        yield Column("tail_shape", "float16/1", "float32", "T,3")
    if capture.boundary:
        yield Column("boundary_logmass", "float16/1", "float32", "T")
    codec = "bfloat16-planes/1" if capture.hidden_codec == "bf16" else "int8-channels/1"
    for layer in spec.hidden:
        yield Column(layer.column, codec, "bfloat16", f"T,{spec.hidden_width}")
    yield Column("exact_hidden", "bfloat16-planes/1", "bfloat16", f"T,{spec.hidden_width}")


def _parse(declaration: bytes) -> ShardSpec:
    try:
        values = json.loads(declaration)
        if values["format"] != FORMAT:
            raise DamageError(f"shard schema: expected format {FORMAT!r}, got {values['format']!r}")
        capture = parse_capture(values["capture"])
        return ShardSpec(capture, values["vocabulary"], values["hidden_width"], values["layers"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(f"shard schema: metadata cannot be parsed: {error!r}") from error


def _check_columns(got: pa.Schema, expected: pa.Schema) -> None:
    for field in expected:
        if field.name not in got.names:
            raise DamageError(f"shard schema: expected column {field.name!r}, got none of that name")
        other = got.field(field.name)
        if other.type != field.type or not (field.metadata or {}).items() <= (other.metadata or {}).items():
            raise DamageError(
                f"shard schema: column {field.name!r}: expected {field.type} {field.metadata or ''}, "
                f"got {other.type} {other.metadata or ''}"
            )
    extra = [name for name in got.names if name not in expected.names]
    if extra:
        raise DamageError(f"shard schema: expected no other columns, got {extra}")
