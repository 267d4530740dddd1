"""The cache as a stream of steps: rows fetched through a bounded window of units, packed ahead by one thread."""

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.cache.reader import CacheReader
from pipeline.contracts import ScoredSequence, Split
from pipeline.errors import AdmissionError
from student.batches import MicroBatch, Reading, pack
from student.group import Group
from student.order import SHUFFLE_UNITS, Order, Step

AHEAD = 2
"""Steps that are packed before they are asked for."""
UNITS_HELD = SHUFFLE_UNITS + 4
"""Decoded units in memory, per cache: a window of the order, and the start of the next."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A sequence of the catalog: one that every cache holds."""

    unit_id: str
    tokens: int
    row_of_cache: tuple[int, ...]
    """Its row in the unit's shard, cache by cache."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A step, this rank's part of it, and how long the rank waited for it."""

    step: Step
    batches: list[MicroBatch]
    waited_s: float


class Rows:
    """Sequences of one or several caches by their number in the catalog; the last few decoded units are kept."""

    def __init__(self, readers: Sequence[CacheReader], split: Split) -> None:
        self._readers = readers
        self.catalog = list(catalog_of(readers, split))
        self._units: OrderedDict[tuple[int, str], list[ScoredSequence]] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> list[ScoredSequence]:
        """The sequence as each cache has it. Raises DamageError, StorageError, AdmissionError."""
        entry = self.catalog[number]
        views = [self._unit(cache, entry.unit_id)[row] for cache, row in enumerate(entry.row_of_cache)]
        for view in views[1:]:
            if not np.array_equal(view.sequence.input_ids_N, views[0].sequence.input_ids_N):
                raise AdmissionError(
                    f"sequence {view.sequence.sequence_id}: the caches hold other tokens under one id; "
                    "teachers of one student must read the same corpus under the same tokenizer"
                )
        return views

    def keep(self, entries: Iterable[Entry]) -> None:
        """Leave out every sequence but these, which may come from a catalog that begins with the same cache."""
        chosen = {(entry.unit_id, entry.row_of_cache[0]) for entry in entries}
        self.catalog = [entry for entry in self.catalog if (entry.unit_id, entry.row_of_cache[0]) in chosen]

    def sequence_id(self, number: int) -> str:
        """The id of a sequence of the catalog; reads its unit."""
        return self[number][0].sequence.sequence_id

    @property
    def unit_numbers(self) -> list[int]:
        """Of each sequence of the catalog: the place of its unit among the split's."""
        places: dict[str, int] = {}
        return [places.setdefault(entry.unit_id, len(places)) for entry in self.catalog]

    def _unit(self, cache: int, unit_id: str) -> list[ScoredSequence]:
        key = (cache, unit_id)
        with self._lock:
            if key not in self._units:
                self._units[key] = self._readers[cache].read_unit(unit_id)
                while len(self._units) > UNITS_HELD * len(self._readers):
                    self._units.popitem(last=False)
            self._units.move_to_end(key)
            return self._units[key]


def catalog_of(readers: Sequence[CacheReader], split: Split) -> Iterator[Entry]:
    """Every sequence that all caches hold, unit by unit in the plan's order.

    Units of one corpus under one tokenizer are alike in every cache, but for rows that a teacher could not process.
    """
    for unit_id in readers[0].unit_ids(split):
        lengths = readers[0].lengths(unit_id)
        if len({reader.commit(unit_id).sequences_sha256 for reader in readers}) == 1:
            yield from (Entry(unit_id, int(n), (row,) * len(readers)) for row, n in enumerate(lengths))
            continue
        rows = [{name: row for row, name in enumerate(reader.shard(unit_id).sequence_ids())} for reader in readers]
        for name, row in rows[0].items():
            if all(name in of_cache for of_cache in rows):
                yield Entry(unit_id, int(lengths[row]), tuple(of_cache[name] for of_cache in rows))


class BatchStream:
    """The steps from `first_step` on, packed for one rank while the rank is busy with the step before."""

    def __init__(
        self, rows: Rows, order: Order, reading: Reading, group: Group, first_step: int = 0, seed: int = 0
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
        short = step.turns(self._group.world) - len(mine)
        mine += [(None, (self._order.shortest(),))] * short
        return [self._pack(step, number, indexes) for number, indexes in mine]

    def _pack(self, step: Step, number: int | None, indexes: Sequence[int]) -> MicroBatch:
        seed = (self._seed * 1_000_003 + step.number * 65_537) % 2**63
        return pack([self._rows[index] for index in indexes], self._reading, number=number, seed=seed)
