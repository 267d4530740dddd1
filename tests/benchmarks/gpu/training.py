"""Part `training`: a step of a 1B student with KD compared with one with cross-entropy only, from a synthetic cache.

Shards are read, decoded and collated in the loader's thread, as in a training. Both arms alternate in blocks of steps,
each with a new loader; the first step of a block, which waits for the loader to start, does not count. Then both are
measured under FSDP2 on one rank. `compiled` measures the step under torch.compile.
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

from gpu.models import LLAMA_1B, TINY, Shape, random_model
from gpu.records import Records
from gpu.synthetic_cache import write_synthetic_cache
from gpu.timing import device, synchronize
from pipeline.cache.reader import CacheReader
from pipeline.config import TrainingSpec
from student.data.batch_sampler import BatchSampler
from student.data.collate import CollateSpec
from student.data.dataset import CacheDataset
from student.data.prefetch import PrefetchLoader
from student.loop.distiller import Coefficients, Distiller, LayerMap
from student.loop.optimizer import make_optimizer
from student.loop.step import take_step
from student.loop.worker_group import WorkerGroup
from student.model.build import Student, head_spec, prepare_for_training

MAX_TIME = 1.03
ARMS = {"kd": Coefficients(kd=0.6, ce=0.4), "ce": Coefficients()}


@dataclass(frozen=True)
class Sizes:
    """The student, the cache, and how many steps are measured."""

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
class StepTimes:
    """Seconds of each step of one arm, and for how many of them it waited for input."""

    seconds: list[float]
    waited_s: float = 0.0

    def wait_share(self) -> float:
        """Return the share of the time spent waiting for input."""
        return self.waited_s / sum(self.seconds)


def run(records: Records, tiny: bool) -> None:
    """Measure the student on one device, then under FSDP2."""
    sizes = TINY_SIZES if tiny else FULL
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        reader = write_synthetic_cache(Path(folder), sizes.shape, sizes.sequences, sizes.sequence_length, sizes.k)
        with records.catch_failure("one device"):
            _measure_one_device(records, reader, sizes)
        gc.collect()  # frees the first student, whose memory the second needs
        with records.catch_failure("FSDP2 on one rank"):
            _measure_fsdp2(records, reader, sizes)


class Trainer:
    """A student with random weights, its optimizer, and the cache that it is trained from."""

    def __init__(self, reader: CacheReader, sizes: Sizes, training: TrainingSpec, fsdp2: bool = False) -> None:
        self._training, self._reader, self._group = training, reader, WorkerGroup(device=device())
        model = random_model(sizes.shape, torch.float32)
        self.student = student = Student(model)
        prepare_for_training(student, training)
        distiller = Distiller(student, training, LayerMap(), head_spec(model.config)).to(device())
        self._module: nn.Module = _shard(distiller, student) if fsdp2 else distiller
        self._optimizer = make_optimizer(self._module, training)
        self.peak_bytes = 0

    def steps(self, arm: str, count: int) -> StepTimes:
        """Take one step that does not count and `count` that do."""
        dataset = CacheDataset([self._reader], "train")
        loader = self._loader(dataset, arm, count + 1)
        times = StepTimes([])
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            start_s = time.perf_counter()
            for loaded in loader:
                take_step(
                    self._module, self._optimizer, loaded.step, loaded.batches, ARMS[arm], self._training.clip_norm,
                    self._group, dataset.sequence_id,
                )  # fmt: skip
                synchronize()
                end_s = time.perf_counter()
                if loaded.step.number > 0:
                    times.seconds.append(end_s - start_s)
                    times.waited_s += loaded.waited_s
                start_s = end_s
        finally:
            loader.close()
        if torch.cuda.is_available():
            self.peak_bytes = torch.cuda.max_memory_allocated()
        return times

    def _loader(self, dataset: CacheDataset, arm: str, steps: int) -> PrefetchLoader:
        training = self._training
        batch_sampler = BatchSampler(
            [entry.tokens for entry in dataset.index], dataset.unit_numbers, seed=0,
            tokens_per_step=training.tokens_per_step, tokens_per_batch=training.tokens_per_batch,
            epochs=100.0, max_steps=steps,
        )  # fmt: skip
        spec = CollateSpec(shards={"synthetic": self._reader.spec}, entries=arm == "kd")
        return PrefetchLoader(dataset, batch_sampler, spec, self._group)


def training_spec(sizes: Sizes, compile_: bool = False) -> TrainingSpec:
    """Return the recipe's section `training`."""
    return TrainingSpec(
        dtype="bfloat16", tokens_per_step=sizes.tokens_per_step, tokens_per_batch=sizes.tokens_per_batch,
        learning_rate=1e-5, compile=compile_,
    )  # fmt: skip


def _measure_one_device(records: Records, reader: CacheReader, sizes: Sizes) -> None:
    trainer = Trainer(reader, sizes, training_spec(sizes))
    times = {arm: StepTimes([]) for arm in ARMS}
    peaks = dict.fromkeys(ARMS, 0)
    for _ in range(sizes.blocks):
        for arm, of_arm in times.items():
            block = trainer.steps(arm, sizes.steps)
            of_arm.seconds += block.seconds
            of_arm.waited_s += block.waited_s
            peaks[arm] = max(peaks[arm], trainer.peak_bytes)
    for arm, of_arm in times.items():
        record(records, sizes, "one device", arm, of_arm, peaks[arm], baseline=times["ce"])
    ratio = statistics.median(times["kd"].seconds) / statistics.median(times["ce"].seconds)
    records.goal(_case(sizes, "one device"), "training: time of a kd step to a ce step", ratio, at_most=MAX_TIME)


def _measure_fsdp2(records: Records, reader: CacheReader, sizes: Sizes) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        trainer = Trainer(reader, sizes, training_spec(sizes), fsdp2=True)
        times = {arm: trainer.steps(arm, sizes.steps) for arm in ARMS}
        for arm, of_arm in times.items():
            record(records, sizes, "FSDP2 on one rank", arm, of_arm, trainer.peak_bytes, baseline=times["ce"])
    finally:
        dist.destroy_process_group()


def _shard(distiller: Distiller, student: Student) -> nn.Module:
    """Apply FSDP2 as `WorkerGroup.parallelize` does with several ranks."""
    for block in student.layers:
        fully_shard(block)
    fully_shard(distiller)
    return distiller


def record(
    records: Records, sizes: Sizes, case: str, arm: str, times: StepTimes, peak_bytes: int, baseline: StepTimes,
    to: str = "ce",
) -> None:  # fmt: skip
    """Record the median step of an arm and its ratio to `baseline`, which the table names `to`."""
    median_s = statistics.median(times.seconds)
    records.figure(
        _case(sizes, case), arm, ms=1000 * median_s, rate=sizes.tokens_per_step / median_s, unit="tokens/s",
        ratio=median_s / statistics.median(baseline.seconds), to=to, peak_bytes=peak_bytes or None,
        note=f"waited for input for {times.wait_share():.2%} of the time",
    )  # fmt: skip


def _case(sizes: Sizes, case: str) -> str:
    return f"{sizes.shape.name}, {sizes.tokens_per_step:,} tokens a step, bfloat16, {case}"
