"""Measures the cache's codecs: bytes by column, their error, and encoding and decoding speed on one core.

The signals are a real teacher's: its states after the final norm times its LM head in float32, reduced as capture
reduces them. Every mode is written as shards of `--unit-sequences` sequences, committed to a cache in a local folder,
and read with the cache's reader: sha256, page checksums, decoding to padded torch tensors, a sequence at a time. Rates
are by the CPU time of one thread, the best of `--rounds`. Exit code 1 if a goal is missed.

    python tests/benchmarks/bench_cache.py --model NAME_OR_DIR --text FILE.jsonl [--tokens 12000]

prints the tables and writes build/bench-cache.json, one record a mode: mode, k, bytes_per_token (entries: ids and
weights and all that decoding them takes), scalar_bytes_per_token, file_bytes_per_token (everything in the file), kl
(of decoded against original, kept and tail; in nats), encode_tokens_per_s, decode_tokens_per_s, bytes_by_column.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bench_cache_signals import Teacher, score_text
from bench_cache_tables import missed, tables
from numpy.typing import NDArray

from pipeline.bfloat16 import to_float32
from pipeline.cache.commit import commit_unit
from pipeline.cache.description import write_cache_identity
from pipeline.cache.format.schema import ShardSpec
from pipeline.cache.format.shard_writer import encode_shard
from pipeline.cache.format.temperature import partition_at
from pipeline.cache.manifest import write_manifest
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage.layout import format_unit_id
from pipeline.cache.storage.store import Store
from pipeline.contracts import CaptureSpec, ScoredSequence, Signals, TargetMode

SCALARS = CaptureSpec(any_temperature=True, boundary=True, temperatures=(1.0,))
MODES = (
    replace(SCALARS, k=50),
    replace(SCALARS, k=64),
    replace(SCALARS, k=128),
    replace(SCALARS, mode=TargetMode.TOPP, top_p=0.95, k=128),
    replace(SCALARS, mode=TargetMode.UNBIASED, k=16, any_temperature=False),
    replace(SCALARS, mode=TargetMode.UNBIASED, k=50, any_temperature=False),
    replace(SCALARS, mode=TargetMode.SAMPLED, k=64, draws=64, any_temperature=False),
)
TEMPERATURES = CaptureSpec(k=1, temperatures=(1.1, 1.25, 1.5, 1.75, 2.0, 2.5))
"""Exact log-partitions that the any-temperature scalars are compared with."""


def main() -> None:
    """Score the text once, measure every mode, print the tables, write the records."""
    arguments = _arguments()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    teacher = score_text(arguments, [*MODES, TEMPERATURES])
    records, partitions = [], {}
    for capture in MODES:
        rows = teacher.signals[capture]
        record, decoded = measure(rows, replace(teacher.spec, capture=capture), arguments)
        records.append(record)
        print(f"{record['mode']} k={record['k']} measured", file=sys.stderr, flush=True)
        if capture.mode is TargetMode.TOPK:
            record["plain"] = _plain(rows)
        if capture == MODES[1]:
            partitions = _partition_errors(decoded, teacher)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(records, indent=1) + "\n")
    print(tables(records, teacher.spec.vocabulary, partitions, hidden_sizes(teacher, arguments)))
    sys.exit(1 if missed(records) else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--unit-sequences", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("build/bench-cache.json"))
    return parser.parse_args()


def measure(
    rows: list[ScoredSequence], spec: ShardSpec, arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[ScoredSequence]]:
    """Return the record of one mode, and the decoded rows."""
    units = [rows[i : i + arguments.unit_sequences] for i in range(0, len(rows), arguments.unit_sequences)]
    shards, encode_s = _best(lambda: [encode_shard(unit, spec) for unit in units], arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        reader = _committed(Path(folder), shards, units)
        _, decode_s = _best(lambda: deque(reader.tensors(reader.unit_ids()), maxlen=1), arguments.rounds)
        decoded = list(reader.rows())
        by_column = _column_bytes(reader, sum(map(len, shards)))
    positions = sum(len(row.signals.entropy_T) for row in rows)
    size = {name: total / positions for name, total in by_column.items()}
    entry_columns = [name for name in size if name.startswith(("entry_", "common_id_"))]
    scalars = [c.name for c in spec.columns if c.codec.startswith("float16") and not c.name.startswith("entry_")]
    record = {
        "mode": str(spec.capture.mode),
        "k": spec.k,
        "positions": positions,
        "bytes_per_token": sum(size[name] for name in entry_columns),
        "scalar_bytes_per_token": sum(size[name] for name in scalars),
        "scalar_bytes_uncompressed": sum(2 * (3 if name == "tail_shape" else 1) for name in scalars),
        "file_bytes_per_token": sum(map(len, shards)) / positions,
        "kl": _kl([row.signals for row in rows], [row.signals for row in decoded]),
        "worst_mass": max(_mass_error(row.signals) for row in decoded),
        "encode_tokens_per_s": positions / encode_s,
        "decode_tokens_per_s": positions / decode_s,
        "bytes_by_column": size,
    }
    return record, decoded


def _committed(folder: Path, shards: Sequence[bytes], units: Sequence[Sequence[ScoredSequence]]) -> CacheReader:
    """Commit the shards to a new cache and open it."""
    store = Store.open(folder)
    write_cache_identity(store, {"of": "the benchmark"})
    for number, (shard, rows) in enumerate(zip(shards, units, strict=True)):
        commit_unit(store, format_unit_id("train", number), shard, rows)
    write_manifest(store)
    return CacheReader.open(store)


def _best(work: Callable[[], Any], rounds: int) -> tuple[Any, float]:
    """Return the result of the last round and the CPU seconds of the fastest."""
    best_s = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        result = work()
        best_s = min(best_s, time.process_time() - start)
    return result, best_s


def _column_bytes(reader: CacheReader, file_bytes: int) -> dict[str, int]:
    """Return the compressed bytes of each column's pages; `footers` is the rest of the files."""
    total: Counter[str] = Counter()
    for unit_id in reader.unit_ids():
        total.update(reader.shard(unit_id).column_bytes())
    return {**total, "footers": file_bytes - total.total()}


def _kl(original: Sequence[Signals], decoded: Sequence[Signals]) -> float:
    """Return the mean over positions of the sum over entries and tail of p log(p / q) - p + q. Ids must be equal.

    This generalised KL is never negative: the last two terms cancel if both rows sum to 1.
    """
    total = 0.0
    for exact, stored in zip(original, decoded, strict=True):
        total += _terms(_by_id(exact), _by_id(stored)) + _terms(exact.tail_logmass_T, stored.tail_logmass_T)
    return total / sum(len(signals.entropy_T) for signals in original)


def _by_id(signals: Signals) -> NDArray[np.float64]:
    """Return the log-weights in the order of their ids."""
    order = np.lexsort((signals.entry_logweight_TK, signals.entry_id_TK))
    return np.take_along_axis(signals.entry_logweight_TK.astype(np.float64), order, axis=1)


def _terms(p: NDArray[np.floating], q: NDArray[np.floating]) -> float:
    kept = np.isfinite(p)
    p, q = p[kept].astype(np.float64), q[kept].astype(np.float64)
    return float((np.exp(p) * (p - q) - np.exp(p) + np.exp(q)).sum())


def _mass_error(signals: Signals) -> float:
    mass_T = np.exp(signals.entry_logweight_TK.astype(np.float64)).sum(axis=1) + np.exp(signals.tail_logmass_T)
    return float(np.abs(mass_T - 1).max())


def _plain(rows: list[ScoredSequence]) -> dict[str, float]:
    """Measure a plain layout: ids as uint16 or uint32 and weights as float16, in rank order, zstd level 3."""
    largest = max(int(row.signals.entry_id_TK.max()) for row in rows)
    width = np.dtype("<u2" if largest < 2**16 else "<u4")
    signals = [row.signals for row in rows]
    columns = {
        "ids": [s.entry_id_TK.astype(width).tobytes() for s in signals],
        "weights": [s.entry_logweight_TK.astype("<f2").tobytes() for s in signals],
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd", compression_level=3, use_dictionary=False)
    group = pq.ParquetFile(pa.BufferReader(sink.getvalue())).metadata.row_group(0)
    size = sum(group.column(number).total_compressed_size for number in range(group.num_columns))
    rounded = [
        replace(s, entry_logweight_TK=_half(s.entry_logweight_TK), tail_logmass_T=_half(s.tail_logmass_T))
        for s in signals
    ]
    positions = sum(len(s.entropy_T) for s in signals)
    raw = signals[0].entry_id_TK.shape[1] * (width.itemsize + 2)
    return {"raw": raw, "zstd": size / positions, "kl": _kl(signals, rounded)}


def _half(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values.astype(np.float16).astype(np.float32)


def _partition_errors(decoded: list[ScoredSequence], teacher: Teacher) -> dict[float, tuple[float, float]]:
    """Return (largest, mean) errors in nats of the log-partition that is rebuilt from decoded rows, by temperature."""
    exact = np.concatenate([row.signals.log_partition_TC for row in teacher.signals[TEMPERATURES]])
    errors = {}
    for number, temperature in enumerate(TEMPERATURES.temperatures):
        rebuilt = [partition_at(row.signals, teacher.spec.vocabulary, temperature)[1] for row in decoded]
        error = np.abs(np.concatenate(rebuilt) - exact[:, number])
        errors[temperature] = (float(error.max()), float(error.mean()))
    return errors


def hidden_sizes(teacher: Teacher, arguments: argparse.Namespace) -> list[tuple[str, float, float]]:
    """Return (codec, bytes a position, relative error) for one hidden layer, with int8 by token for comparison."""
    sizes = []
    states = [row.signals.hidden_TLD[:, 0] for row in teacher.states if row.signals.hidden_TLD is not None]
    for codec in ("bf16", "int8"):
        spec = replace(teacher.spec, capture=replace(teacher.spec.capture, hidden_codec=codec))
        record, decoded = measure(teacher.states, spec, arguments)
        size = record["bytes_by_column"][spec.hidden[0].column]
        got = [row.signals.hidden_TLD[:, 0] for row in decoded if row.signals.hidden_TLD is not None]
        pairs = [(to_float32(a), to_float32(b)) for a, b in zip(states, got, strict=True)]
        sizes.append((codec, size, _relative_error(pairs)))
    by_token = [(to_float32(state), _int8_by_token(to_float32(state))) for state in states]
    return [*sizes, ("int8, a scale a token", float(states[0].shape[1] + 4), _relative_error(by_token))]


def _relative_error(pairs: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> float:
    """Return the mean over channels of RMS error / standard deviation of the channel."""
    exact, got = (np.concatenate(side).astype(np.float64) for side in zip(*pairs, strict=True))
    return float(np.sqrt(((exact - got) ** 2).mean(axis=0) / exact.var(axis=0)).mean())


def _int8_by_token(state_TD: NDArray[np.float32]) -> NDArray[np.float32]:
    scale_T1 = np.abs(state_TD).max(axis=1, keepdims=True) / 127
    rounded: NDArray[np.float32] = np.rint(state_TD / scale_T1) * scale_T1
    return rounded


if __name__ == "__main__":
    main()
