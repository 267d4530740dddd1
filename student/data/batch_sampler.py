"""The BatchSampler of a training: which sequences make up which optimizer step.

A pure function of (seed, epoch, step) and of the sequences' lengths, for any number of workers. An epoch visits every
sequence once: units in random order, sequences shuffled within a window of `SHUFFLE_UNITS` units (so that the dataset
caches one window), cut greedily into steps of at most `tokens_per_step`. The sequences of a step are packed uncut into
micro-batches of at most `tokens_per_batch`. Micro-batch i of a step belongs to rank i mod world size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, takewhile

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import RecipeError

SHUFFLE_UNITS = 16
"""Units per shuffle window."""


@dataclass(frozen=True, slots=True)
class Step:
    """The sequences of one optimizer step, packed into micro-batches. Indexes are numbers of the dataset."""

    number: int
    """Counted over the whole run, from 0."""
    epoch: int
    micro_batches: tuple[tuple[int, ...], ...]

    def for_rank(self, rank: int, world: int) -> list[tuple[int, tuple[int, ...]]]:
        """Return (number, indexes) of the micro-batches that this rank trains on."""
        return [(i, batch) for i, batch in enumerate(self.micro_batches) if i % world == rank]

    def micro_steps_per_rank(self, world: int) -> int:
        """Number of forward passes of every rank: collectives need the same number, so some ranks add empty ones."""
        return -(-len(self.micro_batches) // world)


class BatchSampler:
    """All optimizer steps of a run, by number: like `torch.utils.data.BatchSampler`, with random access.

    `lengths_S` holds the tokens of each sequence, `unit_S` the number of its unit. Raises RecipeError if the longest
    sequence exceeds `tokens_per_batch` or there is no sequence.
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

    def __len__(self) -> int:
        """Optimizer steps of the run."""
        return self._first_steps[-1]

    def __getitem__(self, number: int) -> Step:
        """Return step `number` in 0..len-1, without computing the steps of other epochs."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        epoch = int(np.searchsorted(self._first_steps, number, side="right")) - 1
        return Step(number, epoch, self._epoch(epoch)[number - self._first_steps[epoch]])

    def __iter__(self) -> Iterator[Step]:
        """Yield every step in order."""
        return map(self.__getitem__, range(len(self)))

    def sequences(self) -> Iterator[int]:
        """Yield every sequence of the run once, in training order: the steps of epoch 0 contain all of them."""
        for step in takewhile(lambda step: step.epoch == 0, self):
            yield from chain.from_iterable(step.micro_batches)

    def shortest_sequence(self) -> int:
        """Index of a sequence with the fewest tokens, for the empty passes."""
        return int(self._lengths_S.argmin())

    def _count(self, epochs: float, max_steps: int | None) -> list[int]:
        """Number of the first step of each epoch, and the number of steps as the last item."""
        first_steps = [0]
        for epoch in range(int(np.ceil(epochs))):
            steps = len(self._epoch(epoch))
            share = min(1.0, epochs - epoch)
            first_steps.append(first_steps[-1] + max(1, round(steps * share)))
            if max_steps is not None and first_steps[-1] >= max_steps:
                return [*first_steps[:-1], max_steps]
        return first_steps

    def _make_epoch(self, epoch: int) -> list[tuple[tuple[int, ...], ...]]:
        """Micro-batches of each step of an epoch."""
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
        """Permutation of all sequences: by window of shuffled units, random within a window."""
        units, index_S = np.unique(self._unit_S, return_inverse=True)
        rank_of_unit = np.argsort(np.argsort(_random(len(units), self._seed, epoch, 0), kind="stable"))
        window_S = rank_of_unit[index_S] // SHUFFLE_UNITS
        order_S: NDArray[np.int64] = np.lexsort((_random(len(self._unit_S), self._seed, epoch, 1), window_S))
        return order_S

    def _pack(self, indexes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """First-fit decreasing bin packing; sequences of equal length keep their order."""
        batches: list[list[int]] = []
        free_tokens: list[int] = []
        for index in sorted(indexes, key=lambda i: -int(self._lengths_S[i])):
            length = int(self._lengths_S[index])
            fits = next((b for b, free in enumerate(free_tokens) if free >= length), None)
            if fits is None:
                batches.append([])
                free_tokens.append(self._tokens_per_batch)
                fits = len(free_tokens) - 1
            batches[fits].append(index)
            free_tokens[fits] -= length
        return tuple(map(tuple, batches))


def _random(count: int, seed: int, epoch: int, stream: int) -> NDArray[np.uint64]:
    """Raw 64-bit numbers: the one part of numpy's random module whose stream is fixed for all versions."""
    key = np.array([seed & (2**64 - 1), (epoch << 8) + stream], dtype=np.uint64)
    raw: NDArray[np.uint64] = np.random.Philox(key=key).random_raw(count)
    return raw
