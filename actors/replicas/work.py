"""What a pool and its actors exchange (small, plain values), the queue of items, and the protocol of a pool's work."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.storage.store import Store
from pipeline.config import TeacherSpec
from pipeline.errors import StillhouseError
from pipeline.run.progress import Progress


@dataclass(frozen=True, slots=True)
class ReplicaLocation:
    """The process that a replica's actor runs in."""

    pid: int
    node_id: str
    """Ray's id of the node."""


@dataclass(frozen=True, slots=True)
class QuarantinedRow:
    """A row that the engine cannot process."""

    sequence_id: str
    reason: str
    """How the row was found."""
    engine_message: str
    """The last error message of the engine about this row."""


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One call to a replica. Serving an item twice does no harm: what it stores is created only if absent."""

    item_id: str
    """The id of a unit, or the path of a batch's answers."""
    method: str
    """Name of the actor method that serves it."""
    rows: tuple[int, int] | None = None
    """Set: process these rows alone (first, one past the last) and discard the result."""
    quarantined: tuple[QuarantinedRow, ...] = ()
    """Rows that crash or hang an engine: they are recorded in quarantine/, and the others are processed."""
    one_by_one: bool = False
    """Process each row in an engine call of its own, because no row crashes the engine alone but some do together."""
    at_engine: bool = True
    """The call takes about as long as a unit at the engine, so the measured timeout applies, not the start timeout."""


@dataclass(frozen=True, slots=True)
class WorkResult:
    """What a call processed and how long it took; also the result of a warm-up and of a part of an item."""

    item_id: str
    rows: int = 0
    tokens: int = 0
    stored_bytes: int = 0
    engine_s: float = 0.0
    """Time in the engine."""
    store_s: float = 0.0
    """Time to encode, hash and upload."""
    quarantined: int = 0
    """Rows of this item that are in quarantine."""


class WorkQueue:
    """Waiting items: those that were put back, then the units at `positions` in `unit_ids`, then those appended.

    The ids of units are computed one by one, so a queue takes four bytes per unit. `append` is for any thread.
    """

    def __init__(self, unit_ids: Sequence[str] = (), positions: NDArray[np.int32] | None = None) -> None:
        self._unit_ids = unit_ids
        self._positions = np.zeros(0, np.int32) if positions is None else positions
        self._next = 0
        self._first: deque[WorkItem] = deque()
        self._last: deque[WorkItem] = deque()

    def __len__(self) -> int:
        """Queued items."""
        return len(self._first) + len(self._positions) - self._next + len(self._last)

    def pop(self) -> WorkItem:
        """Take the next item. Raises IndexError where the queue is empty."""
        if self._first or self._next == len(self._positions):
            return (self._first or self._last).popleft()
        self._next += 1
        return WorkItem(self._unit_ids[int(self._positions[self._next - 1])], "capture")

    def put_back(self, item: WorkItem) -> None:
        """Queue an item again, before the others."""
        self._first.appendleft(item)

    def append(self, item: WorkItem) -> None:
        """Queue an item behind the others."""
        self._last.append(item)


class Work(Protocol):
    """What the replicas of one teacher do: which items there are, which actor serves them, what a result is used for.

    A pool calls all methods from one thread.
    """

    job: str
    """`capture` or `generate`, in the names of metrics."""
    item_noun: str
    """What metrics call the items: `units` or `batches`."""
    row_noun: str
    """What messages call the rows: `rows` or `prompts`."""
    teacher: TeacherSpec
    store: Store
    queue: WorkQueue
    calls_per_replica: int
    """Calls in flight per replica."""
    rows_per_item: int
    """Rows of the largest item."""
    tokens_per_item: int
    """Tokens of the largest item."""
    progress: Progress
    """Advanced by `complete`."""
    total_rows: int
    """Rows of all items, which the quarantine cap is a share of."""
    may_grow: bool = False
    """More items may come while none is queued: idle replicas are kept until another pool needs their resources."""
    closing: bool = False
    """Only checks are left, which do not count into the throughput."""
    finished: bool = False
    """Nothing is left to do."""

    def create_actor(self, options: Mapping[str, Any], threads: int) -> Any:
        """Create a `ReplicaActor` with these Ray options and CPU threads."""

    def submit(self, actor: Any, item: WorkItem) -> Any:
        """Call the actor; returns the reference of the result."""

    def row_ids(self, item: WorkItem) -> Sequence[str]:
        """Ids of the item's rows, in order; none where poison rows are not searched for."""

    def complete(self, item: WorkItem, result: Any) -> None:
        """Use the result of an item."""

    def fail(self, error: StillhouseError) -> None:
        """Take note that the pool has failed and completes no further item."""
        return
