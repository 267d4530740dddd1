"""A cache on the local disk with random tokens and random kept entries, written in the project's format."""

from pathlib import Path

import numpy as np

from gpu.models import Shape, random_sequences
from pipeline.cache.commit import commit_unit
from pipeline.cache.description import write_cache_identity, write_teacher
from pipeline.cache.format.schema import ShardSpec
from pipeline.cache.format.shard_writer import encode_shard
from pipeline.cache.manifest import write_manifest
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage.store import Store
from pipeline.cache.unit_list import write_units
from pipeline.contracts import CaptureSpec, ScoredSequence, Signals, TeacherDescription, TokenSequence, Unit

TAIL = 0.05
"""Mass outside the kept entries."""
UNIT_SEQUENCES = 8


def write_synthetic_cache(folder: Path, shape: Shape, sequences: int, length: int, k: int) -> CacheReader:
    """Write the cache of a teacher of that shape: `sequences` of `length` tokens, k entries a row."""
    teacher = TeacherDescription(
        "synthetic", "LlamaForCausalLM", shape.vocabulary, shape.layers, shape.width, "bfloat16", "dummy", "1"
    )
    spec = ShardSpec.of(CaptureSpec(k=k), teacher)
    store = Store.open(folder)
    write_cache_identity(store, {"written_by": "bench_gpu"})
    write_teacher(store, teacher, spec)
    drawn = random_sequences(sequences, length, shape.vocabulary)
    units = [
        Unit(f"train-{number:05d}", "train", tuple(drawn[start : start + UNIT_SEQUENCES]))
        for number, start in enumerate(range(0, sequences, UNIT_SEQUENCES))
    ]
    write_units(store, units)
    for number, unit in enumerate(units):
        rows = [ScoredSequence(sequence, _signals(sequence, spec, number)) for sequence in unit.sequences]
        commit_unit(store, unit.unit_id, encode_shard(rows, spec), rows)
    write_manifest(store)
    return CacheReader.open(store)


def _signals(sequence: TokenSequence, spec: ShardSpec, seed: int) -> Signals:
    draw = np.random.default_rng(seed)
    rows, k = len(sequence.input_ids_N) - 1, spec.k
    stride = spec.vocabulary // k  # one id from each of k ranges, so that ids are distinct
    id_TK = draw.permuted(draw.integers(0, stride, (rows, k)) + stride * np.arange(k), axis=1)
    logit_TK = -np.sort(-draw.normal(0, 2, (rows, k)), axis=1)
    logweight_TK = logit_TK - np.log(np.exp(logit_TK).sum(1, keepdims=True)) + np.log1p(-TAIL)
    ones_T = np.ones(rows, np.float32)
    return Signals(
        entry_id_TK=id_TK.astype(np.int32),
        entry_logweight_TK=logweight_TK.astype(np.float32),
        tail_logmass_T=ones_T * np.float32(np.log(TAIL)),
        label_logprob_T=-3 * ones_T,
        entropy_T=3 * ones_T,
        log_partition_TC=np.zeros((rows, len(spec.capture.temperatures)), np.float32),
    )
