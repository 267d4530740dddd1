"""Which sequences go through a model together."""

from collections.abc import Iterator, Sequence

from pipeline.contracts import TokenSequence


def batches(sequences: Sequence[TokenSequence], max_tokens: int) -> Iterator[list[int]]:
    """Indices of sequences, the longest first, so that a padded batch holds at most `max_tokens` (one at least)."""
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i].input_ids_N), i))
    start = 0
    while start < len(order):
        longest = len(sequences[order[start]].input_ids_N)
        size = max(1, max_tokens // longest)
        yield order[start : start + size]
        start += size
