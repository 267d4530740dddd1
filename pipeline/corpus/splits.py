"""The split of each document, `train` or `held_out`, by a hash of its id."""

from collections.abc import Iterable

from pipeline.contracts import Split
from pipeline.identity import uniform


def hash_split(document_id: str, held_out: float, seed: int) -> Split:
    """Return `held_out` with that probability, otherwise `train`: a pure function of the arguments.

    With a larger `held_out`, documents only move from `train` to `held_out`.
    """
    return "held_out" if _hash(document_id, seed) < held_out else "train"


class Splitter:
    """`hash_split`, corrected so that both splits contain a document where the corpus has two.

    If the hash puts all documents into one split, the document with the hash nearest to the threshold moves to the
    other: the choice depends on the set of ids, not on their order. A single document is in `train` unless `held_out`
    is 1.
    """

    def __init__(self, ids: Iterable[str], held_out: float, seed: int) -> None:
        """Read ids until both splits contain one."""
        self._held_out, self._seed = held_out, seed
        self._moved: dict[str, Split] = self._find_moved(ids) if 0.0 < held_out < 1.0 else {}

    def __call__(self, document_id: str) -> Split:
        """Return the split of a document."""
        return self._moved.get(document_id) or hash_split(document_id, self._held_out, self._seed)

    def _find_moved(self, ids: Iterable[str]) -> dict[str, Split]:
        lowest: tuple[float, str] | None = None
        highest: tuple[float, str] | None = None
        for document_id in ids:
            hashed = (_hash(document_id, self._seed), document_id)
            lowest = min(lowest or hashed, hashed)
            highest = max(highest or hashed, hashed)
            if lowest[0] < self._held_out <= highest[0]:
                return {}
        if lowest is None or highest is None:
            return {}
        if highest[0] < self._held_out:
            return {highest[1]: "train"}
        return {} if lowest == highest else {lowest[1]: "held_out"}


def _hash(document_id: str, seed: int) -> float:
    return uniform("split", seed, document_id)
