"""The map-style Dataset of a training: the sequences that one or several caches store under the same ids.

Loads no model, so that a job can index its caches before it starts workers.
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
from student.losses.selection import difference_sampling
from student.training_job import TrainingJob

CACHED_UNITS = SHUFFLE_UNITS + 4
"""Decoded units in memory per cache: one shuffle window, and the first units of the next."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """Location of one sequence that every cache contains."""

    unit_id: str
    tokens: int
    row_of_cache: tuple[int, ...]
    """Row number in the unit's shard, one per cache."""


class CacheDataset:
    """Sequences by number, each as every cache stores it, through an LRU cache of decoded units."""

    def __init__(self, readers: Sequence[CacheReader], split: Split) -> None:
        self._readers = readers
        self.index = list(index_sequences(readers, split))
        self._units: OrderedDict[tuple[int, str], list[ScoredSequence]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.index)

    def __getitem__(self, number: int) -> list[ScoredSequence]:
        """Return the sequence, once per cache. Raises DamageError, StorageError, AdmissionError."""
        entry = self.index[number]
        by_cache = [self._unit(cache, entry.unit_id)[row] for cache, row in enumerate(entry.row_of_cache)]
        for scored in by_cache[1:]:
            if not np.array_equal(scored.sequence.input_ids_N, by_cache[0].sequence.input_ids_N):
                raise AdmissionError(
                    f"sequence {scored.sequence.sequence_id}: the caches store different tokens under this id; "
                    "teachers of one student must read the same corpus under the same tokenizer"
                )
        return by_cache

    def select(self, entries: Iterable[IndexEntry]) -> None:
        """Drop every sequence that is not among `entries` (of any dataset whose first cache is the same)."""
        chosen = {(entry.unit_id, entry.row_of_cache[0]) for entry in entries}
        self.index = [entry for entry in self.index if (entry.unit_id, entry.row_of_cache[0]) in chosen]

    def sequence_id(self, number: int) -> str:
        """Return the id of a sequence; reads its unit."""
        return self[number][0].sequence.sequence_id

    @property
    def unit_numbers(self) -> list[int]:
        """Number of the unit of each sequence, counted from 0 in the order of the index."""
        numbers: dict[str, int] = {}
        return [numbers.setdefault(entry.unit_id, len(numbers)) for entry in self.index]

    def _unit(self, cache: int, unit_id: str) -> list[ScoredSequence]:
        key = (cache, unit_id)
        with self._lock:
            if key not in self._units:
                self._units[key] = self._readers[cache].read_unit(unit_id)
                while len(self._units) > CACHED_UNITS * len(self._readers):
                    self._units.popitem(last=False)
            self._units.move_to_end(key)
            return self._units[key]


def index_sequences(readers: Sequence[CacheReader], split: Split) -> Iterator[IndexEntry]:
    """Yield the location of every sequence that all caches contain, unit by unit in the plan's order.

    Units of one corpus under one tokenizer have the same rows in every cache, except rows that a teacher could not
    process. Reads sequence ids from the shards only where the commits' digests of the sequences differ.
    """
    for unit_id in readers[0].unit_ids(split):
        lengths = readers[0].lengths(unit_id)
        if len({reader.commit(unit_id).sequences_sha256 for reader in readers}) == 1:
            yield from (IndexEntry(unit_id, int(n), (row,) * len(readers)) for row, n in enumerate(lengths))
            continue
        rows = [{name: row for row, name in enumerate(reader.shard(unit_id).sequence_ids())} for reader in readers]
        for name, row in rows[0].items():
            if all(name in of_cache for of_cache in rows):
                yield IndexEntry(unit_id, int(lengths[row]), tuple(of_cache[name] for of_cache in rows))


def make_dataset(job: TrainingJob, caches: Sequence[CacheReader]) -> CacheDataset:
    """Open the training split: all sequences, or those that difference sampling selects. Raises RecipeError.

    Difference sampling reads the first cache and the reference cache once from end to end, on every rank.
    """
    dataset, reference, selection = CacheDataset(caches, "train"), job.reference(), job.recipe.training.selection
    if reference is not None and selection.sequences is not None:
        both = CacheDataset([caches[0], reference], "train")
        scored = (both[number] for number in range(len(both)))
        pairs = ((first.signals.label_logprob_T, second.signals.label_logprob_T) for first, second in scored)
        kept = difference_sampling(pairs, selection.sequences.share)
        dataset.select(entry for entry, chosen in zip(both.index, kept, strict=True) if chosen)
    return dataset


def make_batch_sampler(job: TrainingJob, dataset: CacheDataset) -> BatchSampler:
    """Build the sampler of a run from the recipe's step and batch sizes. Raises RecipeError."""
    training = job.recipe.training
    return BatchSampler(
        [entry.tokens for entry in dataset.index],
        dataset.unit_numbers,
        seed=job.seed,
        tokens_per_step=training.tokens_per_step,
        tokens_per_batch=training.tokens_per_batch,
        epochs=training.epochs,
        max_steps=training.max_steps,
    )
