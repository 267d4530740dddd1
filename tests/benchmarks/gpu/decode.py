"""Part `decode`: from shards on the local disk to tensors on the device, in signal rows per second.

decode                      read, verify and decode every shard
decode, 4 threads           the same, one shard a thread
decode and collate          and collate each unit into a micro-batch
to the device, pageable     and copy the micro-batches
to the device, pinned       and copy them from page-locked memory
copy only, pageable/pinned  the copies of micro-batches that are collated already
"""

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu.models import LLAMA_1B, TINY, Shape
from gpu.records import Records
from gpu.synthetic_cache import write_synthetic_cache
from gpu.timing import device, interleaved_ms, wall_ms
from pipeline.cache.reader import CacheReader
from student.data.collate import CollateSpec, MicroBatch, collate

THREADS = 4


@dataclass(frozen=True)
class Sizes:
    """Sizes of the cache."""

    shape: Shape
    sequences: int
    sequence_length: int
    k: int
    rounds: int


FULL = Sizes(LLAMA_1B, 32, 1024, 64, 3)
TINY_SIZES = Sizes(TINY, 16, 16, 4, 1)


def run(records: Records, tiny: bool) -> None:
    """Measure every variant on the same cache."""
    sizes = TINY_SIZES if tiny else FULL
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        reader = write_synthetic_cache(Path(folder), sizes.shape, sizes.sequences, sizes.sequence_length, sizes.k)
        with records.catch_failure("decode"):
            _measure(records, reader, sizes)


def _measure(records: Records, reader: CacheReader, sizes: Sizes) -> None:
    units, spec = reader.unit_ids(), CollateSpec(shards={"synthetic": reader.spec})
    collated = list(_micro_batches(reader, spec))
    pinned = [_pin(batch) for batch in collated]
    rows = sum(len(batch.row_T) for batch in collated)
    variants: dict[str, Callable[[], object]] = {
        "decode": lambda: [len(reader.read_unit(unit)) for unit in units],
        f"decode, {THREADS} threads": lambda: _decode_by_threads(reader, units),
        "decode and collate": lambda: [batch.tokens for batch in _micro_batches(reader, spec)],
        "to the device, pageable": lambda: [batch.to(device()) for batch in _micro_batches(reader, spec)],
        "to the device, pinned": lambda: [_copy_async(_pin(batch)) for batch in _micro_batches(reader, spec)],
        "copy only, pageable": lambda: [batch.to(device()) for batch in collated],
        "copy only, pinned": lambda: [_copy_async(batch) for batch in pinned],
    }
    found_ms = interleaved_ms(variants, sizes.rounds, measure=wall_ms)
    copied_bytes = sum(tensor.nbytes for batch in collated for tensor in _tensors(batch))
    stored_bytes = sum(reader.commit(unit).bytes for unit in units)
    for variant, ms in found_ms.items():
        note = f"{stored_bytes / rows:.0f} bytes a row stored" if variant == "decode" else None
        if variant.startswith("copy only"):
            note = f"{copied_bytes / (ms / 1000) / 1e9:.1f} GB/s"
        records.figure(
            f"V={sizes.shape.vocabulary:,} k={sizes.k}", variant, ms=ms, rate=rows / (ms / 1000), unit="rows/s",
            ratio=ms / found_ms["decode"], to="decode", note=note,
        )  # fmt: skip


def _decode_by_threads(reader: CacheReader, units: list[str]) -> int:
    with ThreadPoolExecutor(THREADS) as threads:
        return sum(len(rows) for rows in threads.map(reader.read_unit, units))


def _micro_batches(reader: CacheReader, spec: CollateSpec) -> Iterator[MicroBatch]:
    """Yield one micro-batch for each unit."""
    for number, unit in enumerate(reader.unit_ids()):
        yield collate([[row] for row in reader.unit_rows(unit)], spec, number=number, seed=0)


def _tensors(batch: MicroBatch) -> Iterator[Tensor]:
    for owner in (batch, batch.targets):
        yield from (value for _, value in _tensor_fields(owner))


def _tensor_fields(owner: Any) -> Iterator[tuple[str, Tensor]]:
    for field in fields(owner):
        value = getattr(owner, field.name)
        if isinstance(value, Tensor):
            yield field.name, value


def _pin(batch: MicroBatch) -> MicroBatch:
    """Return a copy in page-locked memory, from which a GPU copies without the CPU; the batch itself on a CPU."""
    return _change_tensors(batch, Tensor.pin_memory) if torch.cuda.is_available() else batch


def _copy_async(batch: MicroBatch) -> MicroBatch:
    """Return a copy on the device; its transfers may still be running."""
    return _change_tensors(batch, lambda tensor: tensor.to(device(), non_blocking=True))


def _change_tensors(batch: MicroBatch, change: Callable[[Tensor], Tensor]) -> MicroBatch:
    targets = replace(batch.targets, **{name: change(value) for name, value in _tensor_fields(batch.targets)})
    return replace(batch, targets=targets, **{name: change(value) for name, value in _tensor_fields(batch)})
