"""The prefetching loader of a training: one background thread collates steps ahead of the training thread.

In the place of `torch.utils.data.DataLoader`: it yields whole optimizer steps, starts at any step, and shares the
dataset's cache of decoded units, which worker processes could not.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from student.data.batch_sampler import BatchSampler, Step
from student.data.collate import CollateSpec, MicroBatch, collate
from student.data.dataset import CacheDataset
from student.loop.worker_group import WorkerGroup

PREFETCH_STEPS = 2
"""Steps that wait in the queue at most."""


@dataclass(frozen=True, slots=True)
class LoadedStep:
    """One step, its micro-batches of this rank, and the seconds for which the training thread waited for it."""

    step: Step
    batches: list[MicroBatch]
    waited_s: float


class PrefetchLoader:
    """Iterable of the steps from `first_step` on, collated for one rank while it trains on the step before."""

    def __init__(
        self,
        dataset: CacheDataset,
        batch_sampler: BatchSampler,
        spec: CollateSpec,
        group: WorkerGroup,
        first_step: int = 0,
        seed: int = 0,
    ) -> None:
        self._dataset, self._batch_sampler, self._spec = dataset, batch_sampler, spec
        self._group, self._seed = group, seed
        self._ready: queue.Queue[tuple[Step, list[MicroBatch]] | Exception | None] = queue.Queue(PREFETCH_STEPS)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(first_step,), daemon=True, name="prefetch")
        self._thread.start()

    def __iter__(self) -> Iterator[LoadedStep]:
        """Yield every step in order, on this rank's device. Raises what the background thread raised."""
        while True:
            started_s = time.perf_counter()
            item = self._ready.get()
            waited_s = time.perf_counter() - started_s
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield LoadedStep(item[0], [batch.to(self._group.device) for batch in item[1]], waited_s)

    def close(self) -> None:
        """Stop the background thread and wait for its end."""
        self._stopped.set()
        self._thread.join()

    def _fill(self, first_step: int) -> None:
        try:
            for number in range(first_step, len(self._batch_sampler)):
                step = self._batch_sampler[number]
                if not self._put((step, self._batches(step))):
                    return
            self._put(None)
        except Exception as error:
            self._put(error)  # of any kind: the training thread raises it

    def _put(self, item: tuple[Step, list[MicroBatch]] | Exception | None) -> bool:
        """Wait until the queue takes the item; return False if the loader was closed before."""
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def _batches(self, step: Step) -> list[MicroBatch]:
        """Micro-batches of this rank, followed by empty passes up to the number that every rank makes."""
        numbered: list[tuple[int | None, tuple[int, ...]]] = [*step.for_rank(self._group.rank, self._group.world_size)]
        empty = step.micro_steps_per_rank(self._group.world_size) - len(numbered)
        numbered += [(None, (self._batch_sampler.shortest_sequence(),))] * empty
        return [self._collate(step, number, indexes) for number, indexes in numbered]

    def _collate(self, step: Step, number: int | None, indexes: Sequence[int]) -> MicroBatch:
        seed = (self._seed * 1_000_003 + step.number * 65_537) % 2**63
        return collate([self._dataset[index] for index in indexes], self._spec, number=number, seed=seed)
