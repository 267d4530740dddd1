"""The cache as a stream of steps, packed ahead by one thread."""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from student.data.batch_sampler import BatchSampler, Step
from student.data.catalog import Rows
from student.data.collate import CollateSpec, MicroBatch, pack
from student.loop.worker_group import WorkerGroup

AHEAD = 2
"""Steps that are packed before they are asked for."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A step, this rank's part of it, and how long the rank waited for it."""

    step: Step
    batches: list[MicroBatch]
    waited_s: float


class BatchStream:
    """The steps from `first_step` on, packed for one rank while the rank is busy with the step before."""

    def __init__(
        self,
        rows: Rows,
        order: BatchSampler,
        reading: CollateSpec,
        group: WorkerGroup,
        first_step: int = 0,
        seed: int = 0,
    ) -> None:
        self._rows, self._order, self._reading, self._group, self._seed = rows, order, reading, group, seed
        self._ready: queue.Queue[tuple[Step, list[MicroBatch]] | Exception | None] = queue.Queue(AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(first_step,), daemon=True, name="batches")
        self._thread.start()

    def __iter__(self) -> Iterator[Loaded]:
        """Every step in turn, on this rank's device. Raises what reading raised."""
        while True:
            started_s = time.perf_counter()
            got = self._ready.get()
            waited_s = time.perf_counter() - started_s
            if got is None:
                return
            if isinstance(got, Exception):
                raise got
            yield Loaded(got[0], [batch.to(self._group.device) for batch in got[1]], waited_s)

    def close(self) -> None:
        """Stop reading ahead."""
        self._stopped.set()
        self._thread.join()

    def _fill(self, first_step: int) -> None:
        try:
            for number in range(first_step, self._order.steps):
                step = self._order.step(number)
                if not self._offer((step, self._batches(step))):
                    return
            self._offer(None)
        except Exception as error:
            self._offer(error)  # whatever it is, the training thread raises it

    def _offer(self, item: tuple[Step, list[MicroBatch]] | Exception | None) -> bool:
        """Wait for room in the queue; False once nobody wants it any more."""
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def _batches(self, step: Step) -> list[MicroBatch]:
        mine: list[tuple[int | None, tuple[int, ...]]] = list(step.of_rank(self._group.rank, self._group.world))
        short = step.micro_steps_per_rank(self._group.world) - len(mine)
        mine += [(None, (self._order.shortest(),))] * short
        return [self._pack(step, number, indexes) for number, indexes in mine]

    def _pack(self, step: Step, number: int | None, indexes: Sequence[int]) -> MicroBatch:
        seed = (self._seed * 1_000_003 + step.number * 65_537) % 2**63
        return pack([self._rows[index] for index in indexes], self._reading, number=number, seed=seed)
