"""Part 6: from a cache's shards on the local disk to tensors on the device, in signal positions per second.

decode                     read, verify and decode every shard
decode, 4 threads          the same, a shard a thread
decode and pack            and make micro-batches of it
to the device, pageable    and copy them
to the device, pinned      and copy them from page-locked memory
copy alone, ...            the copies of micro-batches that are packed already
"""

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu.made_up_cache import write_cache
from gpu.models import LLAMA_1B, TINY, Shape
from gpu.records import Records
from gpu.timing import device, interleaved_ms, wall_ms
from pipeline.cache.reader import CacheReader
from student.batches import MicroBatch, Reading, pack

THREADS = 4


@dataclass(frozen=True)
class Sizes:
    """The cache."""

    shape: Shape
    sequences: int
    sequence_length: int
    k: int
    rounds: int


FULL = Sizes(LLAMA_1B, 32, 1024, 64, 3)
TINY_SIZES = Sizes(TINY, 16, 16, 4, 1)


def run(records: Records, tiny: bool) -> None:
    """Measure every way over the same cache."""
    sizes = TINY_SIZES if tiny else FULL
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        reader = write_cache(Path(folder), sizes.shape, sizes.sequences, sizes.sequence_length, sizes.k)
        with records.guard("decode"):
            _measure(records, reader, sizes)


def _measure(records: Records, reader: CacheReader, sizes: Sizes) -> None:
    units, reading = reader.unit_ids(), Reading(shards={"made-up": reader.spec})
    packed = list(_batches(reader, reading))
    pinned = [_pinned(batch) for batch in packed]
    positions = sum(len(batch.row_T) for batch in packed)
    ways: dict[str, Callable[[], object]] = {
        "decode": lambda: [len(reader.read_unit(unit)) for unit in units],
        f"decode, {THREADS} threads": lambda: _side_by_side(reader, units),
        "decode and pack": lambda: [batch.tokens for batch in _batches(reader, reading)],
        "to the device, pageable": lambda: [batch.to(device()) for batch in _batches(reader, reading)],
        "to the device, pinned": lambda: [_copied(_pinned(batch)) for batch in _batches(reader, reading)],
        "copy alone, pageable": lambda: [batch.to(device()) for batch in packed],
        "copy alone, pinned": lambda: [_copied(batch) for batch in pinned],
    }
    found_ms = interleaved_ms(ways, sizes.rounds, measure=wall_ms)
    bytes_ = sum(tensor.nbytes for batch in packed for tensor in _tensors(batch))
    stored = sum(reader.commit(unit).bytes for unit in units)
    for way, ms in found_ms.items():
        note = f"{stored / positions:.0f} bytes a position stored" if way == "decode" else None
        if way.startswith("copy alone"):
            note = f"{bytes_ / (ms / 1000) / 1e9:.1f} GB/s"
        records.figure(
            f"V={sizes.shape.vocabulary:,} k={sizes.k}", way, ms=ms, rate=positions / (ms / 1000), unit="positions/s",
            ratio=ms / found_ms["decode"], to="decode", note=note,
        )  # fmt: skip


def _side_by_side(reader: CacheReader, units: list[str]) -> int:
    with ThreadPoolExecutor(THREADS) as threads:
        return sum(len(rows) for rows in threads.map(reader.read_unit, units))


def _batches(reader: CacheReader, reading: Reading) -> Iterator[MicroBatch]:
    """A micro-batch a unit."""
    for number, unit in enumerate(reader.unit_ids()):
        yield pack([[row] for row in reader.unit_rows(unit)], reading, number=number, seed=0)


def _tensors(batch: MicroBatch) -> Iterator[Tensor]:
    for owner in (batch, batch.targets):
        yield from (value for _, value in _tensor_fields(owner))


def _tensor_fields(owner: Any) -> Iterator[tuple[str, Tensor]]:
    for field in fields(owner):
        value = getattr(owner, field.name)
        if isinstance(value, Tensor):
            yield field.name, value


def _pinned(batch: MicroBatch) -> MicroBatch:
    """The batch in page-locked memory, where a GPU can read it by itself."""
    return _changed(batch, Tensor.pin_memory) if torch.cuda.is_available() else batch


def _copied(batch: MicroBatch) -> MicroBatch:
    """The batch on the device; the copies may still be under way."""
    return _changed(batch, lambda tensor: tensor.to(device(), non_blocking=True))


def _changed(batch: MicroBatch, change: Callable[[Tensor], Tensor]) -> MicroBatch:
    targets = replace(batch.targets, **{name: change(value) for name, value in _tensor_fields(batch.targets)})
    return replace(batch, targets=targets, **{name: change(value) for name, value in _tensor_fields(batch)})
