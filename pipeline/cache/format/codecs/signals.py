"""Encodes the signals of a sequence as binary columns of a row, and decodes them."""

from collections.abc import Mapping

import numpy as np

from pipeline.cache.format.codecs.entries import decode_entries, encode_entries
from pipeline.cache.format.codecs.hidden import decode_bfloat16, decode_int8, encode_bfloat16, encode_int8
from pipeline.cache.format.codecs.mass import check_mass
from pipeline.cache.format.codecs.scalars import Buffer, decode_float16, encode_float16
from pipeline.cache.format.codecs.weights import tail_of_draws
from pipeline.cache.format.schema import ShardSpec
from pipeline.contracts import Bf16Array, FloatArray, Signals, TargetMode


def encode_signals(signals: Signals, spec: ShardSpec) -> dict[str, bytes]:
    """Return the spec's columns, except `loss_mask` and `byte_end`, which belong to the sequence.

    Raises ValueError if a signal is missing or has another shape than the spec's, or if entries and tail do not sum
    to 1.
    """
    _check_shapes(signals, spec)
    columns = encode_entries(signals.entry_id_TK, signals.entry_logweight_TK, spec)
    check_mass(signals.entry_logweight_TK, signals.tail_logmass_T, spec)
    columns |= {name: encode_float16(values) for name, values in _scalars(signals, spec).items()}
    encode = encode_bfloat16 if spec.capture.hidden_codec == "bf16" else encode_int8
    for number, layer in enumerate(spec.hidden):
        assert signals.hidden_TLD is not None
        columns[layer.column] = encode(signals.hidden_TLD[:, number])
    exact_TD = signals.exact_hidden_TD
    columns["exact_hidden"] = b"" if exact_TD is None else encode_bfloat16(exact_TD)
    return columns


def decode_signals(columns: Mapping[str, Buffer], n_tokens: int, spec: ShardSpec) -> Signals:
    """Decode signals, each to its codec's precision. Raises ValueError if a column's bytes do not fit."""
    rows = n_tokens - 1
    tail_T = np.full(rows, -np.inf, np.float32)
    if spec.has_tail:
        tail_T = decode_float16(columns["tail_logmass"], (rows,))
    entry_id_TK, entry_logweight_TK = decode_entries(columns, tail_T, spec)
    if spec.capture.mode is TargetMode.SAMPLED:
        tail_T = tail_of_draws(entry_logweight_TK, spec.capture.draws)
    exact = columns["exact_hidden"]
    return Signals(
        entry_id_TK=entry_id_TK,
        entry_logweight_TK=entry_logweight_TK,
        tail_logmass_T=tail_T,
        label_logprob_T=decode_float16(columns["label_logprob"], (rows,)),
        entropy_T=decode_float16(columns["entropy"], (rows,)),
        log_partition_TC=_log_partitions(columns, rows, spec),
        tail_shape_T3=decode_float16(columns["tail_shape"], (rows, 3)) if spec.capture.any_temperature else None,
        boundary_logmass_T=decode_float16(columns["boundary_logmass"], (rows,)) if spec.capture.boundary else None,
        hidden_TLD=_decode_hidden(columns, rows, spec),
        exact_hidden_TD=decode_bfloat16(exact, rows, spec.hidden_width) if len(exact) else None,
    )


def _scalars(signals: Signals, spec: ShardSpec) -> dict[str, FloatArray]:
    scalars = {"label_logprob": signals.label_logprob_T, "entropy": signals.entropy_T}
    if spec.has_tail:
        scalars["tail_logmass"] = signals.tail_logmass_T
    if spec.temperatures:
        scalars["log_partition"] = signals.log_partition_TC[:, _stored_temperatures(spec)]
    if spec.capture.any_temperature and signals.tail_shape_T3 is not None:
        scalars["tail_shape"] = signals.tail_shape_T3
    if spec.capture.boundary and signals.boundary_logmass_T is not None:
        scalars["boundary_logmass"] = signals.boundary_logmass_T
    return scalars


def _log_partitions(columns: Mapping[str, Buffer], rows: int, spec: ShardSpec) -> FloatArray:
    values_TC = np.zeros((rows, len(spec.capture.temperatures)), np.float32)
    if spec.temperatures:
        stored = _stored_temperatures(spec)
        values_TC[:, stored] = decode_float16(columns["log_partition"], (rows, len(stored)))
    return values_TC


def _stored_temperatures(spec: ShardSpec) -> list[int]:
    return [number for number, temperature in enumerate(spec.capture.temperatures) if temperature != 1.0]


def _decode_hidden(columns: Mapping[str, Buffer], rows: int, spec: ShardSpec) -> Bf16Array | None:
    if not spec.hidden:
        return None
    decode = decode_bfloat16 if spec.capture.hidden_codec == "bf16" else decode_int8
    return np.stack([decode(columns[layer.column], rows, spec.hidden_width) for layer in spec.hidden], axis=1)


def _check_shapes(signals: Signals, spec: ShardSpec) -> None:
    rows, width = len(signals.label_logprob_T), spec.hidden_width
    expected: dict[str, tuple[int, ...] | None] = {
        "entry_id_TK": (rows, spec.k),
        "entry_logweight_TK": (rows, spec.k),
        "tail_logmass_T": (rows,),
        "label_logprob_T": (rows,),
        "entropy_T": (rows,),
        "log_partition_TC": (rows, len(spec.capture.temperatures)),
        "tail_shape_T3": (rows, 3) if spec.capture.any_temperature else None,
        "boundary_logmass_T": (rows,) if spec.capture.boundary else None,
        "hidden_TLD": (rows, len(spec.hidden), width) if spec.hidden else None,
    }
    if signals.exact_hidden_TD is not None:
        expected["exact_hidden_TD"] = (rows, width)
    for name, shape in expected.items():
        value = getattr(signals, name)
        if shape is not None and (value is None or value.shape != shape):
            raise ValueError(f"{name}: expected shape {shape}, got {None if value is None else value.shape}")
