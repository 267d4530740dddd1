"""Which sequences make up which step: a pure function of (seed, epoch, step) and of the sequences' lengths.

Nothing here knows how many workers train. Every epoch walks through all sequences once: units in a random order,
sequences shuffled within a window of units (so that a reader needs to hold only a window), cut greedily into steps of
at most `tokens_per_step`. A step's sequences are packed into micro-batches of at most `tokens_per_batch`, none is cut
or dropped. Micro-batch i of a step belongs to rank i mod world size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import RecipeError

SHUFFLE_UNITS = 16
"""Units whose sequences are shuffled among each other."""


@dataclass(frozen=True, slots=True)
class Step:
    """The sequences of one optimizer step, packed. Indexes count the catalog's sequences."""

    number: int
    """Counted over the whole run, from 0."""
    epoch: int
    micro_batches: tuple[tuple[int, ...], ...]

    def of_rank(self, rank: int, world: int) -> list[tuple[int, tuple[int, ...]]]:
        """(number, indexes) of the micro-batches that this rank trains on."""
        return [(i, batch) for i, batch in enumerate(self.micro_batches) if i % world == rank]

    def micro_steps_per_rank(self, world: int) -> int:
        """Forward passes that every rank makes, so that collectives meet; a rank short of batches makes empty ones."""
        return -(-len(self.micro_batches) // world)


class BatchSampler:
    """All steps of a run.

    `lengths_S` are tokens per sequence, `unit_S` the number of the unit that each lies in.
    Raises RecipeError where the longest sequence does not fit a micro-batch or there is nothing to train on.
    """

    def __init__(
        self,
        lengths_S: Sequence[int],
        unit_S: Sequence[int],
        *,
        seed: int,
        tokens_per_step: int,
        tokens_per_batch: int,
        epochs: float = 1.0,
        max_steps: int | None = None,
    ) -> None:
        self._lengths_S = np.asarray(lengths_S, dtype=np.int64)
        self._unit_S = np.asarray(unit_S, dtype=np.int64)
        self._seed, self._tokens_per_step, self._tokens_per_batch = seed, tokens_per_step, tokens_per_batch
        if len(self._lengths_S) == 0:
            raise RecipeError("training: the cache holds no training sequences; lower corpus.held_out")
        longest = int(self._lengths_S.max())
        if longest > tokens_per_batch:
            raise RecipeError(
                f"training.tokens_per_batch: expected at least the longest sequence ({longest} tokens), "
                f"got {tokens_per_batch}"
            )
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._first_steps = self._count(epochs, max_steps)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self._first_steps[-1]

    def step(self, number: int) -> Step:
        """Step `number` in 0..steps-1."""
        epoch = int(np.searchsorted(self._first_steps, number, side="right")) - 1
        return Step(number, epoch, self._epoch(epoch)[number - self._first_steps[epoch]])

    def sequences(self) -> Iterator[int]:
        """Every sequence that the run trains on, once, by the step that first does."""
        seen: set[int] = set()
        for number in range(self.steps):
            new = [index for batch in self.step(number).micro_batches for index in batch if index not in seen]
            seen.update(new)
            yield from new

    def shortest(self) -> int:
        """The sequence that costs least, for the empty passes of ranks that are short of batches."""
        return int(self._lengths_S.argmin())

    def _count(self, epochs: float, max_steps: int | None) -> list[int]:
        first_steps = [0]
        for epoch in range(int(np.ceil(epochs))):
            here = len(self._epoch(epoch))
            share = min(1.0, epochs - epoch)
            first_steps.append(first_steps[-1] + max(1, round(here * share)))
            if max_steps is not None and first_steps[-1] >= max_steps:
                return [*first_steps[:-1], max_steps]
        return first_steps

    def _make_epoch(self, epoch: int) -> list[tuple[tuple[int, ...], ...]]:
        steps: list[list[int]] = [[]]
        tokens = 0
        for index in self._shuffled(epoch).tolist():
            length = int(self._lengths_S[index])
            if tokens + length > self._tokens_per_step:
                steps.append([])
                tokens = 0
            steps[-1].append(index)
            tokens += length
        return [self._pack(step) for step in steps]

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        units = np.unique(self._unit_S)
        rank_of_unit = np.empty(int(units.max()) + 1, dtype=np.int64)
        shuffled_units = units[np.argsort(_random(len(units), self._seed, epoch, 0), kind="stable")]
        rank_of_unit[shuffled_units] = np.arange(len(units))
        window_S = rank_of_unit[self._unit_S] // SHUFFLE_UNITS
        order_S: NDArray[np.int64] = np.lexsort((_random(len(self._unit_S), self._seed, epoch, 1), window_S))
        return order_S

    def _pack(self, indexes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """First fit, longest first (ties: in the order of the step)."""
        batches: list[list[int]] = []
        rooms: list[int] = []
        for index in sorted(indexes, key=lambda i: -int(self._lengths_S[i])):
            length = int(self._lengths_S[index])
            fits = next((b for b, room in enumerate(rooms) if room >= length), None)
            if fits is None:
                batches.append([])
                rooms.append(self._tokens_per_batch)
                fits = len(rooms) - 1
            batches[fits].append(index)
            rooms[fits] -= length
        return tuple(map(tuple, batches))


def _random(count: int, seed: int, epoch: int, stream: int) -> NDArray[np.uint64]:
    """Raw 64-bit numbers: the one part of numpy's random module whose stream is fixed for all versions."""
    key = np.array([seed & (2**64 - 1), (epoch << 8) + stream], dtype=np.uint64)
    raw: NDArray[np.uint64] = np.random.Philox(key=key).random_raw(count)
    return raw
