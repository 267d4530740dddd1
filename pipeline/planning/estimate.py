"""Estimates of a capture's stored bytes and memory, without torch and without an engine.

Stored bytes are measured: synthetic signals of the right shapes go through the codecs and Parquet. A real text may take
a quarter less or more. Weights are counted from the headers of the safetensors files.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from pipeline.bfloat16 import to_bfloat16
from pipeline.cache.format import parquet
from pipeline.cache.format.schema import ShardSpec
from pipeline.cache.format.shard_writer import encode_shard
from pipeline.config import TeacherSpec
from pipeline.contracts import Bf16Array, FloatArray, IntArray, ScoredSequence, Signals, TargetMode, TokenSequence
from pipeline.errors import ModelError

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
RUNTIME_BYTES = 1 << 30
"""Resident memory of Python, torch, Ray and an engine without a model."""
UNITS_IN_FLIGHT = 3
"""Units whose signals an actor holds at the same time."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Peak memory of one teacher actor and all its ranks, in bytes."""

    weights_bytes: int
    kv_cache_bytes: int
    chunk_bytes: int
    """One chunk of logits in float32."""
    signals_bytes: int
    """Signals of the units in flight, before they are encoded."""
    runtime_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of all parts."""
        return self.weights_bytes + self.kv_cache_bytes + self.chunk_bytes + self.signals_bytes + self.runtime_bytes


def teacher_memory(
    teacher: TeacherSpec, spec: ShardSpec, folder: Path | None, unit_tokens: int, *, on_gpu: bool = False
) -> Memory:
    """Peak host memory of a teacher's actor and ranks. `folder` is None for a teacher without weights.

    With `on_gpu` the weights, the KV cache and the logits are in GPU memory; runtime and signals remain.
    """
    hosted = None if on_gpu else folder
    return Memory(
        weights_bytes=0 if hosted is None else weights_bytes(hosted, teacher),
        kv_cache_bytes=0 if hosted is None else int(teacher.kv_cache_gib * 2**30),
        chunk_bytes=0 if on_gpu else _chunk_bytes(teacher, spec),
        signals_bytes=UNITS_IN_FLIGHT * unit_tokens * raw_bytes_per_token(spec),
        runtime_bytes=RUNTIME_BYTES * teacher.ranks,
    )


def gpu_bytes_per_rank(teacher: TeacherSpec, spec: ShardSpec, folder: Path | None, kv_bytes: int) -> int:
    """Minimum GPU memory of a rank: its shard of the weights and of `kv_bytes`, and a chunk of logits.

    `kv_bytes`: KV cache of one sequence, without which an engine does not start.
    """
    weights = 0 if folder is None else weights_bytes(folder, teacher)
    return (weights + kv_bytes) // teacher.ranks + _chunk_bytes(teacher, spec)


def _chunk_bytes(teacher: TeacherSpec, spec: ShardSpec) -> int:
    return 4 * min(teacher.chunk_rows, teacher.max_batched_tokens) * spec.vocabulary


def raw_bytes_per_token(spec: ShardSpec) -> int:
    """Bytes of one row of signals before encoding, the exact state included."""
    scalars = 4 * (6 + len(spec.capture.temperatures))
    return 8 * spec.k + scalars + 2 * spec.hidden_width * (len(spec.hidden) + 1)


def kv_bytes_per_token(config: dict[str, Any], dtype: str) -> int:
    """KV-cache bytes of one token over all layers, from a model's config."""
    heads = int(config["num_attention_heads"])
    width = int(config.get("head_dim") or config["hidden_size"] // heads)
    kept_heads = int(config.get("num_key_value_heads") or heads)
    return 2 * int(config["num_hidden_layers"]) * kept_heads * width * DTYPE_BYTES[dtype]


def weights_bytes(folder: Path, teacher: TeacherSpec) -> int:
    """Bytes of a model's weights as loaded: in the teacher's dtype, or as stored where they are quantised."""
    tensors = [tensor for file in folder.glob("*.safetensors") for tensor in _tensors(file)]
    if teacher.quantization is not None:
        return sum(math.prod(shape) * _bits(dtype) // 8 for shape, dtype in tensors)
    return sum(math.prod(shape) for shape, _ in tensors) * DTYPE_BYTES[teacher.dtype]


def column_bytes(spec: ShardSpec, sequence_length: int, sequences: int = 2) -> dict[str, float]:
    """Stored bytes per token of every column, measured by writing synthetic signals.

    `exact_hidden` is that of an audited sequence; the other columns do not depend on auditing.
    """
    rows = [_synthetic_row(spec, sequence_length, number) for number in range(sequences)]
    sizes = parquet.column_bytes(parquet.open_parquet(encode_shard(rows, spec), "synthetic").metadata)
    return {name: size / (sequences * sequence_length) for name, size in sizes.items()}


def _tensors(file: Path) -> list[tuple[list[int], str]]:
    """Return shape and safetensors dtype of each tensor, from the file's header."""
    try:
        with safe_open(file, framework="np") as tensors:
            slices = [tensors.get_slice(name) for name in tensors.keys()]  # noqa: SIM118 (safe_open is no mapping)
            return [(tensor.get_shape(), tensor.get_dtype()) for tensor in slices]
    except (OSError, SafetensorError) as error:
        raise ModelError(f"model file {file}: expected safetensors, got {error!r}") from error


def _bits(dtype: str) -> int:
    """Return the bits of one number: "BF16", "F8_E4M3" and "F4" carry them, "BOOL" takes a byte."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8


def _synthetic_row(spec: ShardSpec, length: int, number: int) -> ScoredSequence:
    rng = np.random.default_rng(number)
    ids_N = _zipf_ids(rng, spec.vocabulary, (length,))
    sequence = TokenSequence(
        sequence_id=f"synthetic-{number:05d}",
        document_id=f"synthetic-{number:05d}",
        domain=None,
        split="train",
        input_ids_N=ids_N,
        loss_mask_N=np.r_[0, np.ones(length - 1)].astype(np.uint8),
        byte_end_N=np.cumsum(rng.integers(1, 9, length)).astype(np.int32),
        audited=True,
    )
    return ScoredSequence(sequence, _synthetic_signals(spec, length - 1, rng))


def _synthetic_signals(spec: ShardSpec, rows: int, rng: np.random.Generator) -> Signals:
    """Signals with Zipf-distributed ids, partly shared by a sequence's rows, and Gaussian hidden states."""
    logweight_TK, tail_T = _power_law(spec, rows, rng)
    return Signals(
        entry_id_TK=_shared_ids(rng, spec, rows),
        entry_logweight_TK=logweight_TK,
        tail_logmass_T=tail_T,
        label_logprob_T=logweight_TK[np.arange(rows), rng.integers(0, spec.k, rows)],
        entropy_T=rng.gamma(2.0, 1.2, rows).astype(np.float32),
        log_partition_TC=rng.gamma(2.0, 1.0, (rows, len(spec.capture.temperatures))).astype(np.float32),
        tail_shape_T3=rng.normal(0, 3, (rows, 3)).astype(np.float32),
        boundary_logmass_T=-rng.gamma(1.0, 1.0, rows).astype(np.float32),
        exact_hidden_TD=_normal_states(rng, (rows, spec.hidden_width)),
        hidden_TLD=_normal_states(rng, (rows, len(spec.hidden), spec.hidden_width)) if spec.hidden else None,
    )


def _power_law(spec: ShardSpec, rows: int, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    rank_V = np.log(np.arange(1, spec.vocabulary + 1))
    steepness_T1 = rng.uniform(1.0, 3.5, (rows, 1))
    partition_T1 = np.array([[np.log(np.exp(-a * rank_V).sum())] for a in steepness_T1[:, 0]])
    noise_TK = np.sort(rng.normal(0, 0.3, (rows, spec.k)))[:, ::-1]
    weight_TK = -steepness_T1 * rank_V[: spec.k] - partition_T1 + noise_TK
    weight_TK -= np.maximum(np.log(np.exp(weight_TK).sum(1, keepdims=True)) + 1e-3, 0.0)
    tail_T = np.log1p(-np.exp(weight_TK).sum(1))
    if spec.has_tail:
        return weight_TK.astype(np.float32), tail_T.astype(np.float32)
    if spec.capture.mode is TargetMode.SAMPLED:
        count_TK = np.maximum(np.rint(np.exp(weight_TK) * spec.capture.draws), 1.0)
        return np.log(count_TK / count_TK.sum(1, keepdims=True)).astype(np.float32), np.full(rows, -np.inf, np.float32)
    weight_TK -= np.log(np.exp(weight_TK).sum(1, keepdims=True))
    return weight_TK.astype(np.float32), np.full(rows, -np.inf, np.float32)


def _shared_ids(rng: np.random.Generator, spec: ShardSpec, rows: int) -> IntArray:
    """Distinct ids in each row, drawn from a pool that the rows share."""
    pool = np.unique(_zipf_ids(rng, spec.vocabulary, (16 * spec.k,)))
    pool = pool if len(pool) >= spec.k else np.arange(spec.k, dtype=np.int32)
    return np.stack([rng.permutation(pool)[: spec.k] for _ in range(rows)]).astype(np.int32)


def _zipf_ids(rng: np.random.Generator, vocabulary: int, shape: tuple[int, ...]) -> IntArray:
    """Token ids with the frequencies of a BPE vocabulary: low ids are frequent."""
    return (vocabulary * rng.random(shape) ** 3).astype(np.int32)


def _normal_states(rng: np.random.Generator, shape: tuple[int, ...]) -> Bf16Array:
    return to_bfloat16(rng.standard_normal(shape).astype(np.float32))
