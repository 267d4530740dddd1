import json
from dataclasses import replace

import fastparquet
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache.format.schema import METADATA_KEY, HiddenLayer, ShardSpec, arrow_schema
from pipeline.contracts import CaptureSpec, TargetMode, TeacherDescription
from pipeline.errors import DamageError

EVERYTHING = CaptureSpec(
    k=7, temperatures=(1.0, 2.0), any_temperature=True, boundary=True, hidden_layers=(0, 15, -1), hidden_codec="int8"
)


def spec_of(capture=EVERYTHING, vocabulary=49152):
    return ShardSpec(capture, vocabulary=vocabulary, hidden_width=8, layers=30)


@pytest.mark.parametrize("mode", list(TargetMode))
def test_the_spec_can_be_parsed_from_the_schema(mode):
    spec = spec_of(replace(EVERYTHING, mode=mode))
    sink = pa.BufferOutputStream()
    pq.write_table(arrow_schema(spec).empty_table(), sink)
    assert ShardSpec.from_schema(pq.read_schema(pa.BufferReader(sink.getvalue()))) == spec


def test_a_spec_is_made_from_capture_spec_and_teacher():
    teacher = TeacherDescription("t", "llama", 49152, 30, 8, "bfloat16", "dummy", "1")
    assert ShardSpec.of(EVERYTHING, teacher) == spec_of()


def test_hidden_layers_are_declared_by_index_and_norm():
    spec = spec_of()
    assert spec.hidden == (HiddenLayer(0, False), HiddenLayer(15, False), HiddenLayer(30, True))
    assert [layer.column for layer in spec.hidden] == ["hidden_0", "hidden_15", "hidden_30_normed"]
    declared = json.loads(arrow_schema(spec).metadata[METADATA_KEY])
    assert declared["hidden"][2] == {"index": 30, "normed": True}


def test_the_last_layer_before_and_after_the_norm_are_two_columns():
    spec = spec_of(replace(EVERYTHING, hidden_layers=(30, -1)))
    assert len({layer.column for layer in spec.hidden}) == 2


def test_every_tensor_column_declares_a_versioned_codec_with_dtype_and_shape():
    for column in spec_of().columns:
        field = arrow_schema(spec_of()).field(column.name)
        codec, dtype, shape = field.metadata[b"codec"].decode().split(" ", 2)
        assert field.type == pa.binary()
        assert codec.partition("/")[2].isdigit()
        assert dtype in {"uint8", "uint32", "int32", "float32", "bfloat16"}
        assert shape.startswith("[")


def test_temperature_one_has_no_column():
    assert "log_partition" not in arrow_schema(spec_of(CaptureSpec(temperatures=(1.0,)))).names
    assert spec_of().temperatures == (2.0,)


@pytest.mark.parametrize("mode", [TargetMode.UNBIASED, TargetMode.SAMPLED])
def test_modes_whose_weights_sum_to_one_have_no_tail_column(mode):
    assert "tail_logmass" not in arrow_schema(spec_of(CaptureSpec(mode=mode))).names


@pytest.mark.parametrize(("vocabulary", "planes"), [(2, 1), (256, 1), (257, 2), (65536, 2), (65537, 3), (2**20, 3)])
def test_ids_take_as_many_planes_as_the_vocabulary_needs(vocabulary, planes):
    names = arrow_schema(spec_of(vocabulary=vocabulary)).names
    assert sum(name.startswith("entry_gap_") for name in names) == planes


def test_scalars_take_at_most_fourteen_bytes_a_position():
    scalars = [c for c in spec_of(replace(EVERYTHING, temperatures=(1.0,))).columns if c.codec == "float16/1"]
    assert sum(2 * (3 if column.shape == "T,3" else 1) for column in scalars) == 14


def changed(**fields):
    schema = arrow_schema(spec_of())
    declared = json.loads(schema.metadata[METADATA_KEY]) | fields
    return schema.with_metadata({METADATA_KEY: json.dumps(declared).encode()})


def without(name):
    schema = arrow_schema(spec_of())
    return schema.remove(schema.names.index(name))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (arrow_schema(spec_of()).remove_metadata(), "expected metadata 'stillhouse', got none"),
        (changed(format="stillhouse-shard/99"), "expected format 'stillhouse-shard/1', got 'stillhouse-shard/99'"),
        (changed(vocabulary=2**20), "expected column 'common_id_2'"),
        (changed(capture={"mode": "guess"}), "metadata cannot be parsed"),
        (changed(capture=None), "metadata cannot be parsed"),
        (arrow_schema(spec_of()).with_metadata({METADATA_KEY: b"{"}), "metadata cannot be parsed"),
        (arrow_schema(spec_of()).append(pa.field("more", pa.int32())), r"expected no other columns, got \['more'\]"),
        (without("log_partition"), "expected column 'log_partition', got none"),
        (arrow_schema(spec_of()).set(9, pa.field("loss_mask", pa.string())), "column 'loss_mask': expected binary"),
    ],
)
def test_a_schema_that_this_release_cannot_decode_is_refused(schema, message):
    with pytest.raises(DamageError, match=message):
        ShardSpec.from_schema(schema)


def test_an_unknown_codec_version_is_refused():
    schema = arrow_schema(spec_of())
    at = schema.names.index("entry_value")
    newer = schema.field(at).with_metadata({b"codec": b"weights-topk/2 float32 [T,7]"})
    with pytest.raises(DamageError, match=r"entry_value.*weights-topk/1.*weights-topk/2"):
        ShardSpec.from_schema(schema.set(at, newer))


def test_fastparquet_reads_the_same_values(tmp_path):
    schema = arrow_schema(spec_of())
    rows = [
        {field.name: bytes([number, 0, 255]) for field in schema if field.type == pa.binary()}
        | {"sequence_id": f"s{number}", "document_id": "d", "domain": None, "split": "train", "n_tokens": 3}
        | {"byte_start": number, "input_ids": [1, 2, number], "input_digest": "00", "audited": bool(number)}
        for number in range(2)
    ]
    path = tmp_path / "shard.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd", use_dictionary=["split"])
    frame = fastparquet.ParquetFile(str(path)).to_pandas()
    for column in spec_of().columns:
        assert list(frame[column.name]) == [row[column.name] for row in rows]
    assert [list(ids) for ids in frame["input_ids"]] == [[1, 2, 0], [1, 2, 1]]
