"""The prefetching loader of a training: one background thread collates steps ahead of the training thread.

In the place of `torch.utils.data.DataLoader`: it yields whole optimizer steps, starts at any step, and shares the
dataset's cache of decoded units, which worker processes could not.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from student.data.batch_sampler import BatchSampler, Step
from student.data.collate import CollateSpec, MicroBatch, collate
from student.data.dataset import CacheDataset
from student.loop.worker_group import WorkerGroup

PREFETCH_STEPS = 2
"""Steps that are collated ahead."""


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
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._numbers = iter(range(first_step, len(batch_sampler)))
        self._pending: deque[Future[tuple[Step, list[MicroBatch]]]] = deque()
        for _ in range(PREFETCH_STEPS):
            self._submit()

    def __iter__(self) -> Iterator[LoadedStep]:
        """Yield every step in order, on this rank's device. Raises what the background thread raised."""
        while self._pending:
            started_s = time.perf_counter()
            step, batches = self._pending.popleft().result()
            waited_s = time.perf_counter() - started_s
            self._submit()
            yield LoadedStep(step, [batch.to(self._group.device) for batch in batches], waited_s)

    def close(self) -> None:
        """Cancel the steps that have not been started, and wait for the background thread's end."""
        self._executor.shutdown(cancel_futures=True)

    def _submit(self) -> None:
        for number in islice(self._numbers, 1):
            self._pending.append(self._executor.submit(self._load, number))

    def _load(self, number: int) -> tuple[Step, list[MicroBatch]]:
        """Micro-batches of this rank, followed by empty passes up to the number that every rank makes."""
        step = self._batch_sampler[number]
        seed = (self._seed * 1_000_003 + number * 65_537) % 2**63
        numbered: list[tuple[int | None, tuple[int, ...]]] = [*step.for_rank(self._group.rank, self._group.world_size)]
        empty = step.micro_steps_per_rank(self._group.world_size) - len(numbered)
        numbered += [(None, (self._batch_sampler.shortest_sequence(),))] * empty
        return step, [
            collate([self._dataset[index] for index in indexes], self._spec, number=batch, seed=seed)
            for batch, indexes in numbered
        ]
