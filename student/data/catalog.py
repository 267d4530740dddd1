"""Which sequences a training reads, from one or several caches that hold the same documents, and in which order.

No room of the student's model is needed here, so that a job can ask before it starts anything.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.cache.reader import CacheReader
from pipeline.contracts import ScoredSequence, Split
from pipeline.errors import AdmissionError
from student.data.batch_sampler import SHUFFLE_UNITS, BatchSampler
from student.losses.selection import by_difference
from student.training_job import TrainingJob

UNITS_HELD = SHUFFLE_UNITS + 4
"""Decoded units in memory, per cache: a window of the order, and the start of the next."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A sequence of the catalog: one that every cache holds."""

    unit_id: str
    tokens: int
    row_of_cache: tuple[int, ...]
    """Its row in the unit's shard, cache by cache."""


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


def make_rows(job: TrainingJob, caches: Sequence[CacheReader]) -> Rows:
    """The sequences that are trained on: all, or those that difference sampling keeps. Raises RecipeError.

    Difference sampling reads both caches once, from end to end, on every rank.
    """
    rows, reference, selection = Rows(caches, "train"), job.reference(), job.recipe.training.selection.sequences
    if reference is not None and selection is not None:
        both = Rows([caches[0], reference], "train")
        views = (both[number] for number in range(len(both.catalog)))
        pairs = ((ours.signals.label_logprob_T, theirs.signals.label_logprob_T) for ours, theirs in views)
        kept = by_difference(pairs, selection.share)
        rows.keep(entry for entry, chosen in zip(both.catalog, kept, strict=True) if chosen)
    return rows


def make_batch_sampler(job: TrainingJob, rows: Rows) -> BatchSampler:
    """Which sequences make up which step. Raises RecipeError."""
    training = job.recipe.training
    return BatchSampler(
        [entry.tokens for entry in rows.catalog],
        rows.unit_numbers,
        seed=job.seed,
        tokens_per_step=training.tokens_per_step,
        tokens_per_batch=training.tokens_per_batch,
        epochs=training.epochs,
        max_steps=training.max_steps,
    )
