"""What a generation pool does: it answers the batches of prompts that reader threads request."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from actors.replicas.work import Work, WorkItem, WorkQueue
from pipeline.cache.storage.store import Store
from pipeline.config import Recipe, TeacherSpec
from pipeline.config.capture import SamplingSpec
from pipeline.contracts import Document
from pipeline.corpus.answers import PromptBatch, read_answers
from pipeline.corpus.prepare import resolve_teacher_model, teacher_identity
from pipeline.errors import DamageError, StillhouseError
from pipeline.run.progress import Progress

BATCH_PROMPTS = 32
"""Enough for continuous batching, and little to repeat after a death."""


class GenerationWork(Work):
    """One teacher's generation. `request`, `answers` and `fail` are for any thread."""

    job, item_noun, row_noun = "generate", "batches", "prompts"
    calls_per_replica = 1
    rows_per_item = BATCH_PROMPTS
    may_grow = True

    def __init__(self, recipe: Recipe, teacher: TeacherSpec, sampling: SamplingSpec) -> None:
        self.teacher = teacher
        self.store = Store.open(recipe.cache_uri(teacher.name))
        self.queue = WorkQueue()
        self.tokens_per_item = BATCH_PROMPTS * sampling.max_tokens
        self.total_rows = 0
        self.progress = Progress(f"generate {teacher.name}", None, unit="prompt")
        self._sampling = sampling
        self._positions = recipe.max_model_len(teacher)
        self._identity = teacher_identity(teacher, resolve_teacher_model(teacher)) | {"positions": self._positions}
        self._lock = threading.Lock()
        self._batches: dict[str, PromptBatch] = {}
        self._written: dict[str, Future[None]] = {}
        self._error: StillhouseError | None = None

    # For reader threads

    def request(self, number: int, prompts: Sequence[Document]) -> PromptBatch:
        """Queue a batch unless its answers are stored or it is queued already. Raises the error of a failed pool."""
        batch = PromptBatch.of(number, prompts, self.teacher.name, self._identity)
        exists = self.store.exists(batch.path)
        with self._lock:
            if self._error is not None:
                raise self._error
            if batch.path not in self._written:
                written = self._written[batch.path] = Future()
                self.total_rows += len(batch.prompts)
                if exists:
                    written.set_result(None)
                else:
                    self._batches[batch.path] = batch
                    self.queue.append(WorkItem(batch.path, "generate"))
        return batch

    def answers(self, batch: PromptBatch) -> list[Document]:
        """Wait until the answers are written, and read them. Raises the failure of the pool, and DamageError."""
        self._written[batch.path].result()
        documents = read_answers(self.store, batch.path)
        if documents is None:
            raise DamageError(f"answers {self.store.where(batch.path)}: expected a file, got none")
        return documents

    # For the pool

    def create_actor(self, options: Mapping[str, Any], threads: int) -> Any:
        """Create a `GenerationActor`. See Work."""
        import ray

        from actors.generate.generation_actor import GenerationActor, GenerationConfig

        config = GenerationConfig(self.store.uri, self.teacher, self._sampling, threads, self._positions)
        return ray.remote(GenerationActor).options(**options).remote(config)

    def submit(self, actor: Any, item: WorkItem) -> Any:
        """See Work."""
        return actor.generate.remote(item, self._batches[item.item_id])

    def row_ids(self, item: WorkItem) -> Sequence[str]:
        """Names of the prompts. See Work."""
        return self._batches[item.item_id].names

    def complete(self, item: WorkItem, result: Any) -> None:
        """Wake the readers that wait for the answers. See Work."""
        self.progress.advance(result.rows, result.tokens)
        del self._batches[item.item_id]
        self._written[item.item_id].set_result(None)

    def fail(self, error: StillhouseError) -> None:
        """Raise the error in every reader that waits for answers, or will. See Work."""
        with self._lock:
            self._error = self._error or error
            unwritten = [written for written in self._written.values() if not written.done()]
        for written in unwritten:
            written.set_exception(error)
