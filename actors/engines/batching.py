"""Batches of sequences for one forward pass."""

from collections.abc import Iterator, Sequence

from pipeline.contracts import TokenSequence


def batches(sequences: Sequence[TokenSequence], max_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices, longest sequences first; a padded batch has at most `max_tokens`, or one sequence."""
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i].input_ids_N), i))
    start = 0
    while start < len(order):
        longest = len(sequences[order[start]].input_ids_N)
        size = max(1, max_tokens // longest)
        yield order[start : start + size]
        start += size
