"""Part 5: a training step of a 1B student with KD beside one with CE alone, from a cache made on the spot.

Reading, decoding and packing run in the stream's thread, as in a training. The two arms take turns in blocks of steps,
each with a stream of its own; the first step of a block waits for the stream to start and does not count. Then both
again under FSDP2 on one rank. `compiled` measures the step under torch.compile.
"""

import gc
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from gpu.made_up_cache import write_cache
from gpu.models import LLAMA_1B, TINY, Shape, random_model
from gpu.records import Records
from gpu.timing import device, synchronize
from pipeline.cache.reader import CacheReader
from pipeline.config import TrainingSpec
from student.batches import Reading
from student.catalog import Rows
from student.distil import Coefficients, Distiller, Matching
from student.group import Group
from student.model import Student, head_spec, prepare
from student.optimise import make_optimizer
from student.order import Order
from student.step import take_step
from student.stream import BatchStream

MOST_TIME = 1.03
ARMS = {"kd": Coefficients(kd=0.6, ce=0.4), "ce": Coefficients()}


@dataclass(frozen=True)
class Sizes:
    """The student, the cache, and how many steps are timed."""

    shape: Shape
    sequences: int
    sequence_length: int
    tokens_per_step: int
    tokens_per_batch: int
    k: int
    blocks: int
    steps: int


FULL = Sizes(LLAMA_1B, 64, 1024, 8192, 4096, 64, 2, 7)
TINY_SIZES = Sizes(TINY, 8, 16, 32, 16, 4, 1, 3)


@dataclass
class Timed:
    """What the steps of one arm came to."""

    seconds: list[float]
    waited_s: float = 0.0

    def share_waited(self) -> float:
        """Of the steps' time."""
        return self.waited_s / sum(self.seconds)


def run(records: Records, tiny: bool) -> None:
    """Measure the plain module, then FSDP2."""
    sizes = TINY_SIZES if tiny else FULL
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        reader = write_cache(Path(folder), sizes.shape, sizes.sequences, sizes.sequence_length, sizes.k)
        with records.guard("plain"):
            _measure_plain(records, reader, sizes)
        gc.collect()  # the student of the plain steps, whose memory the next one needs
        with records.guard("FSDP2 on one rank"):
            _measure_fsdp2(records, reader, sizes)


class Trainer:
    """A student with random weights, its optimizer, and the cache that it learns from."""

    def __init__(self, reader: CacheReader, sizes: Sizes, training: TrainingSpec, parallel: bool = False) -> None:
        self._training, self._reader, self.group = training, reader, Group(device=device())
        model = random_model(sizes.shape, torch.float32)
        self.student = student = Student(model)
        prepare(student, training)
        distiller = Distiller(student, training, Matching(), head_spec(model.config)).to(device())
        self._module: nn.Module = _in_parts(distiller, student) if parallel else distiller
        self._optimizer = make_optimizer(self._module, training)
        self._rows = Rows([reader], "train")
        self.peak_bytes = 0

    def steps(self, arm: str, count: int) -> Timed:
        """Take `count` steps after one that does not count."""
        stream = self._stream(arm, count + 1)
        timed = Timed([])
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            start_s = time.perf_counter()
            for loaded in stream:
                take_step(
                    self._module, self._optimizer, loaded.step, loaded.batches, ARMS[arm], self._training.clip_norm,
                    self.group, self._rows.sequence_id,
                )  # fmt: skip
                synchronize()
                end_s = time.perf_counter()
                if loaded.step.number > 0:
                    timed.seconds.append(end_s - start_s)
                    timed.waited_s += loaded.waited_s
                start_s = end_s
        finally:
            stream.close()
        if torch.cuda.is_available():
            self.peak_bytes = torch.cuda.max_memory_allocated()
        return timed

    def _stream(self, arm: str, steps: int) -> BatchStream:
        training = self._training
        order = Order(
            [entry.tokens for entry in self._rows.catalog], self._rows.unit_numbers, seed=0,
            tokens_per_step=training.tokens_per_step, tokens_per_batch=training.tokens_per_batch,
            epochs=100.0, max_steps=steps,
        )  # fmt: skip
        reading = Reading(shards={"made-up": self._reader.spec}, entries=arm == "kd")
        return BatchStream(Rows([self._reader], "train"), order, reading, self.group)


def training_spec(sizes: Sizes, compile_: bool = False) -> TrainingSpec:
    """The recipe's section `training`."""
    return TrainingSpec(
        dtype="bfloat16", tokens_per_step=sizes.tokens_per_step, tokens_per_batch=sizes.tokens_per_batch,
        learning_rate=1e-5, compile=compile_,
    )  # fmt: skip


def _measure_plain(records: Records, reader: CacheReader, sizes: Sizes) -> None:
    trainer = Trainer(reader, sizes, training_spec(sizes))
    timed = {arm: Timed([]) for arm in ARMS}
    peaks = dict.fromkeys(ARMS, 0)
    for _ in range(sizes.blocks):
        for arm, all_blocks in timed.items():
            block = trainer.steps(arm, sizes.steps)
            all_blocks.seconds += block.seconds
            all_blocks.waited_s += block.waited_s
            peaks[arm] = max(peaks[arm], trainer.peak_bytes)
    for arm, found in timed.items():
        record(records, sizes, "plain", {arm: found}, peaks[arm], beside=timed["ce"])
    ratio = statistics.median(timed["kd"].seconds) / statistics.median(timed["ce"].seconds)
    records.goal(_case(sizes, "plain"), "training: KD step's time, of CE", ratio, at_most=MOST_TIME)


def _measure_fsdp2(records: Records, reader: CacheReader, sizes: Sizes) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        trainer = Trainer(reader, sizes, training_spec(sizes), parallel=True)
        timed = {arm: trainer.steps(arm, sizes.steps) for arm in ARMS}
        for arm, found in timed.items():
            record(records, sizes, "FSDP2 on one rank", {arm: found}, trainer.peak_bytes, beside=timed["ce"])
    finally:
        dist.destroy_process_group()


def _in_parts(distiller: Distiller, student: Student) -> nn.Module:
    """As `Group.share` wraps a module where there are several ranks."""
    for block in student.layers:
        fully_shard(block)
    fully_shard(distiller)
    return distiller


def record(
    records: Records, sizes: Sizes, case: str, timed: dict[str, Timed], peak_bytes: int, beside: Timed, to: str = "ce"
) -> None:
    """One figure for each arm, with its ratio to the steps `beside`."""
    for arm, found in timed.items():
        median_s = statistics.median(found.seconds)
        records.figure(
            _case(sizes, case), arm, ms=1000 * median_s, rate=sizes.tokens_per_step / median_s, unit="tokens/s",
            ratio=median_s / statistics.median(beside.seconds), to=to, peak_bytes=peak_bytes or None,
            note=f"waited for input for {found.share_waited():.2%} of the time",
        )  # fmt: skip


def _case(sizes: Sizes, case: str) -> str:
    return f"{sizes.shape.name}, {sizes.tokens_per_step:,} tokens a step, bfloat16, {case}"
