"""What a scoring pool does: capture the pending units, then write the manifest, then check the cache's faithfulness."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from actors.checks.faithfulness import Comparison, assess
from actors.replicas.work import Work, WorkItem, WorkQueue
from actors.scoring.teacher_actor import CONCURRENT_CALLS, TeacherActor, TeacherActorConfig
from pipeline.cache.faithfulness import Verdict
from pipeline.cache.storage.layout import MANIFEST_JSON
from pipeline.cache.unit_list import UnitList
from pipeline.config import Recipe, TeacherSpec
from pipeline.corpus.prepare import PreparedCache
from pipeline.run.progress import Progress


class ScoringWork(Work):
    """One teacher's scoring. `pending`: positions in `cache.unit_ids` of the units without a commit."""

    job, item_noun, row_noun = "capture", "units", "rows"
    calls_per_replica = CONCURRENT_CALLS

    def __init__(self, recipe: Recipe, teacher: TeacherSpec, cache: PreparedCache, pending: NDArray[np.int32]) -> None:
        units = len(cache.unit_ids)
        self.teacher, self.store = teacher, cache.store
        self.queue = WorkQueue(cache.unit_ids, pending)
        self.rows_per_item = recipe.capture.unit_sequences
        self.tokens_per_item = self.rows_per_item * recipe.corpus.sequence_length
        self.total_rows = units * self.rows_per_item
        self.progress = Progress(f"capture {teacher.name}", units, units - len(pending))
        self.verdict: Verdict | None = None
        self._recipe = recipe
        self._uncommitted = len(pending)
        self._sample: list[str] | None = None
        self._comparisons: dict[str, Comparison] = {}
        self._close_if_committed()

    def create_actor(self, options: Mapping[str, Any], threads: int) -> Any:
        """Create a `TeacherActor`. See Work."""
        spec, length = self._recipe.capture.spec(self._recipe.seed), self._recipe.corpus.sequence_length
        config = TeacherActorConfig(self.store.uri, self.teacher, spec, threads, length)
        return ray.remote(TeacherActor).options(**options, max_concurrency=CONCURRENT_CALLS + 1).remote(config)

    def submit(self, actor: Any, item: WorkItem) -> Any:
        """Call `capture`, `finish` or `check`. See Work."""
        return getattr(actor, item.method).remote(item)

    def row_ids(self, item: WorkItem) -> Sequence[str]:
        """Sequence ids of a unit. See Work."""
        if item.method != "capture":
            return []
        return [sequence.sequence_id for sequence in UnitList.open(self.store).read(item.item_id).sequences]

    def complete(self, item: WorkItem, result: Any) -> None:
        """Count a committed unit, queue the checks that `finish` has chosen, or add a comparison. See Work."""
        if item.method == "capture":
            self._uncommitted -= 1
            self.progress.advance(1, result.tokens)
            self._close_if_committed()
        elif item.method == "finish":
            self._sample = [check.item_id for check in result]
            for check in result:
                self.queue.append(check)
        else:
            self._comparisons[item.item_id] = result
        if self._sample is not None and len(self._comparisons) == len(self._sample):
            self.verdict = assess(self._comparisons.values(), self._sample)
            self.finished = True

    def _close_if_committed(self) -> None:
        """Have a replica write the manifest once all units are committed: that takes memory for every commit."""
        if not self._uncommitted:
            self.closing = True
            self.progress.stop_clock()
            self.queue.append(WorkItem(MANIFEST_JSON, "finish", at_engine=False))
