"""`generate` mode: before its cache is cut, a teacher answers the corpus' prompts and leaves the answers in the store.

Batches of prompts go to writers on Ray, in a session of its own that is over, memory and all, before any engine opens
to score. Files that are there already are not written again, so an interrupted run goes on; when nothing is missing,
Ray is not even started. The answers are asked for as the cutter takes them: past `corpus.max_tokens` nobody writes.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from pipeline.answers import Answerer, PromptBatch, read_answers
from pipeline.cache.storage import Store
from pipeline.config import Recipe, TeacherSpec
from pipeline.config.capture import SamplingSpec
from pipeline.contracts import Document
from pipeline.errors import DamageError, EngineError, StillhouseError
from pipeline.prepare import model_of, teacher_identity
from pipeline.session import ray_session

BATCH_PROMPTS = 32
"""Enough for an engine that answers many at a time, and little to lose."""
BATCHES_AHEAD = 2
"""That many files for each writer are under way, besides the one that is waited for."""


@contextmanager
def answering(recipe: Recipe, teacher: TeacherSpec) -> Iterator[Answerer | None]:
    """Who answers the teacher's prompts; None where it only reads. Writers and Ray are gone in the end."""
    if teacher.sampling is None:
        yield None
        return
    with ExitStack() as stack:
        desk = Desk(recipe, teacher, teacher.sampling, stack)
        yield desk
        if desk.written:
            print(f"generate {teacher.name}: {desk.written} prompts answered", flush=True)


class Desk:
    """Hands prompts to writers, and their answers on, in order."""

    def __init__(self, recipe: Recipe, teacher: TeacherSpec, sampling: SamplingSpec, stack: ExitStack) -> None:
        self.written = 0
        self._recipe, self._teacher, self._sampling, self._stack = recipe, teacher, sampling, stack
        self._store = Store.open(recipe.cache_uri(teacher.name))
        self._writers: list[Any] = []

    def __call__(self, prompts: Iterator[Document]) -> Iterator[Document]:
        """See Answerer. Raises CorpusError for what is no prompt, and EngineError where the teacher cannot go on."""
        identity = teacher_identity(self._teacher, model_of(self._teacher))
        under_way: deque[tuple[PromptBatch, Any]] = deque()
        for number in itertools.count():
            group = list(itertools.islice(prompts, BATCH_PROMPTS))
            if not group:
                break
            batch = PromptBatch.of(number, group, identity)
            under_way.append((batch, self._ask(number, batch)))
            if len(under_way) > BATCHES_AHEAD * max(1, len(self._writers)):
                yield from self._take(*under_way.popleft())
        while under_way:
            yield from self._take(*under_way.popleft())

    def _ask(self, number: int, batch: PromptBatch) -> Any:
        if self._store.exists(batch.path):
            return None
        self._writers = self._writers or self._hire()
        return self._writers[number % len(self._writers)].write.remote(batch)

    def _take(self, batch: PromptBatch, ref: Any) -> list[Document]:
        if ref is not None:
            self._wait_for(ref)
            self.written += len(batch.prompts)
        documents = read_answers(self._store, batch.path)
        if documents is None:
            raise DamageError(f"answers {self._store.where(batch.path)}: there a moment ago, now gone")
        return documents

    def _wait_for(self, ref: Any) -> None:
        import ray

        try:
            ray.get(ref)
        except StillhouseError as error:
            raise error.cause if isinstance(error, ray.exceptions.RayTaskError) else error from None
        except ray.exceptions.RayError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise EngineError(f"teacher {self._teacher.name}: writing answers: {lines[-1][:500]}") from error

    def _hire(self) -> list[Any]:
        """As many writers as replicas, where there is room for all of them."""
        import ray

        from actors.placement import MAX_RESTARTS, Site, check_fits, fitting, place, threads_of
        from actors.scribe import Scribe

        recipe, teacher = self._recipe, self._teacher
        self._stack.enter_context(ray_session(recipe.cluster))
        cluster = ray.cluster_resources()
        placement = place(teacher, cluster)
        if recipe.cluster.address == "local":
            check_fits(teacher, placement, cluster)
        threads = threads_of(teacher, recipe, int(cluster.get("CPU", 1)))
        writers = []
        for _ in range(min(teacher.replica_range[0], fitting(placement, cluster))):
            site = Site(placement)
            options = site.options() | {"max_task_retries": MAX_RESTARTS}
            writer = ray.remote(Scribe).options(**options).remote(self._store.uri, teacher, self._sampling, threads)
            self._stack.callback(site.release)
            self._stack.callback(ray.kill, writer)
            writers.append(writer)
        return writers
