"""Part `capture`: signals by the transformers engine, compared with bare prefill of the same model.

    bare prefill  the model on the same batches, logits of each sequence's last token only, nothing kept
    score         the engine's signals as arrays on the host: prefill, LM head, reduction, packing, copy
    capture       the same, while a thread encodes each unit as the bytes of a shard, in memory

One more run measures each step of a capture, with the device synchronized before and after it and encoding at the end.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from actors.engines import open_engine, transformers_engine
from actors.engines.batching import batches
from gpu.models import LLAMA_1B, LLAMA_135M, TINY, Shape, model_folder, random_sequences
from gpu.records import Records
from gpu.timing import device, interleaved_ms, peak_bytes, synchronize, wall_ms
from pipeline.cache.format.schema import ShardSpec
from pipeline.cache.format.shard_writer import encode_shard
from pipeline.config.capture import TeacherSpec
from pipeline.contracts import CaptureSpec, Engine, ScoredSequence, TokenSequence

MIN_OF_PREFILL = 0.90
UNIT_SEQUENCES = 8
STEPS = ("prefill", "LM head", "reduction", "packing", "copy and unpacking", "encoding")


@dataclass(frozen=True)
class Setting:
    """How the engine batches and chunks the same tokens."""

    max_batched_tokens: int
    chunk_rows: int
    sequence_length: int


@dataclass(frozen=True)
class Sizes:
    """Models, settings, and the tokens of one round."""

    shapes: tuple[Shape, ...]
    settings: tuple[Setting, ...]
    tokens: int
    k: int
    rounds: int


FULL = Sizes((LLAMA_135M, LLAMA_1B), (Setting(8192, 1024, 1024), Setting(2048, 256, 512)), 32_768, 64, 3)
"""The settings: one for a GPU, and the defaults of a recipe."""
TINY_SIZES = Sizes((TINY,), (Setting(32, 8, 12),), 96, 4, 1)


def run(records: Records, tiny: bool) -> None:
    """Measure every model with every setting."""
    sizes = TINY_SIZES if tiny else FULL
    for shape in sizes.shapes:
        with records.catch_failure(shape.name), model_folder(shape, torch.bfloat16) as folder:
            for setting in sizes.settings:
                teacher = TeacherSpec(
                    name="bench", model=str(folder.path), engine="transformers", dtype="bfloat16",
                    max_batched_tokens=setting.max_batched_tokens, chunk_rows=setting.chunk_rows,
                )  # fmt: skip
                case = f"{shape.name}, batches of {setting.max_batched_tokens:,}, chunks of {setting.chunk_rows:,}"
                with records.catch_failure(case):
                    engine = open_engine(teacher, folder, CaptureSpec(k=sizes.k))
                    count = sizes.tokens // setting.sequence_length
                    sequences = random_sequences(count, setting.sequence_length, shape.vocabulary)
                    _measure(records, case, engine, teacher, sequences, sizes)
                    engine.close()


def _measure(
    records: Records, case: str, engine: Engine, teacher: TeacherSpec, sequences: list[TokenSequence], sizes: Sizes
) -> None:
    shard = ShardSpec.of(CaptureSpec(k=sizes.k), engine.describe())
    variants: dict[str, Callable[[], object]] = {
        "bare prefill": lambda: _prefill(engine, teacher, sequences),
        "score": lambda: [len(engine.score(unit)) for unit in _units(sequences)],
        "capture": lambda: _capture(engine, shard, sequences),
    }
    found_ms = interleaved_ms(variants, sizes.rounds, measure=wall_ms)
    tokens = sum(len(sequence.input_ids_N) for sequence in sequences)
    for variant, ms in found_ms.items():
        records.figure(
            case, variant, ms=ms, rate=tokens / (ms / 1000), unit="tokens/s", ratio=found_ms["bare prefill"] / ms,
            to="bare prefill", peak_bytes=peak_bytes(variants[variant]),
        )  # fmt: skip
    share = found_ms["bare prefill"] / found_ms["capture"]
    records.goal(case, "capture: tokens/s, of bare prefill", share, at_least=MIN_OF_PREFILL)
    seconds = _seconds_by_step(engine, shard, sequences)
    for step, step_s in seconds.items():
        records.figure(
            case, f"step: {step}", ms=1000 * step_s, rate=tokens / step_s, unit="tokens/s",
            ratio=step_s / sum(seconds.values()), to="all steps",
        )  # fmt: skip


@torch.inference_mode()
def _prefill(engine: Any, teacher: TeacherSpec, sequences: Sequence[TokenSequence]) -> None:
    for indices in batches(sequences, teacher.max_batched_tokens):
        ids_BN = torch.stack([torch.from_numpy(sequences[i].input_ids_N) for i in indices]).to(device()).long()
        engine._model(input_ids=ids_BN, use_cache=False, logits_to_keep=1)


def _capture(engine: Engine, shard: ShardSpec, sequences: list[TokenSequence]) -> int:
    """Return the bytes of all shards."""
    with ThreadPoolExecutor(1) as encoder:
        units = [encoder.submit(encode_shard, _score(engine, unit), shard) for unit in _units(sequences)]
        return sum(len(unit.result()) for unit in units)


def _score(engine: Engine, unit: list[TokenSequence]) -> list[ScoredSequence]:
    return [ScoredSequence(s, signals) for s, signals in zip(unit, engine.score(unit), strict=True)]


def _units(sequences: list[TokenSequence]) -> Iterator[list[TokenSequence]]:
    for start in range(0, len(sequences), UNIT_SEQUENCES):
        yield sequences[start : start + UNIT_SEQUENCES]


def _seconds_by_step(engine: Engine, shard: ShardSpec, sequences: list[TokenSequence]) -> dict[str, float]:
    """Return the seconds of each of STEPS over all sequences."""
    seconds = dict.fromkeys(STEPS, 0.0)
    functions = [
        (engine, "_forward", "prefill"),
        (engine, "_logits", "LM head"),
        (transformers_engine, "reduce_rows", "reduction"),
        (transformers_engine, "pack_rows", "packing"),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in functions]
    for owner, name, step in functions:
        setattr(owner, name, _timed(getattr(owner, name), seconds, step))
    try:
        all_s = wall_ms(lambda: _score(engine, sequences)) / 1000
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
    seconds["copy and unpacking"] = max(all_s - sum(seconds.values()), 1e-9)
    units = [_score(engine, unit) for unit in _units(sequences)]
    seconds["encoding"] = wall_ms(lambda: [len(encode_shard(unit, shard)) for unit in units]) / 1000
    return seconds


def _timed(function: Callable[..., Any], seconds: dict[str, float], step: str) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        synchronize()
        start_s = time.perf_counter()
        found = function(*arguments)
        synchronize()
        seconds[step] += time.perf_counter() - start_s
        return found

    return timed
