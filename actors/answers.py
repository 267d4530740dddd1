"""`generate` mode: before caches are cut, teachers answer the corpus' prompts and leave the answers in the store.

Batches of prompts go to writers on Ray, in a session of its own that is over, memory and all, before any engine opens
to score. All teachers write at once, side by side where there is room. Files that are there already are not written
again, so an interrupted run goes on; when nothing is missing, Ray is not even started. The answers are asked for as the
cutters take them: past `corpus.max_tokens` nobody writes.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from actors.lease import Outcome
from actors.losses import Losses
from actors.patience import Patience
from actors.placement import living_nodes, threads_of
from actors.rows import allowed_casualties
from pipeline.cache.storage.store import Store
from pipeline.config import Recipe, TeacherSpec
from pipeline.contracts import Document
from pipeline.corpus.answers import Answerer, PromptBatch, quarantined_prompts, read_answers
from pipeline.corpus.prepare import PreparedCache, prepare_cache, resolve_teacher_model, teacher_identity
from pipeline.errors import DamageError, EngineError, StillhouseError
from pipeline.planning.resources import Placement, check_fits, fitting, placement_for
from pipeline.run.progress import HEARTBEAT_S
from pipeline.run.ray_session import ray_session

if TYPE_CHECKING:
    from actors.clerk import Clerk
    from actors.scribe import Commission

BATCH_PROMPTS = 32
"""Enough for an engine that answers many at a time, and little to lose."""
BATCHES_AHEAD = 2
"""That many files for each writer are asked for beyond what is waited for, where the corpus has a cap."""
FREE_BATCHES_AHEAD = 32
"""And in all where it has none: every prompt will be answered."""
TICK_S = 0.2


def prepare_caches(
    recipe: Recipe, teachers: Sequence[TeacherSpec], patience: Patience | None = None
) -> list[PreparedCache]:
    """Every teacher's cache, ready to be filled; prompts are answered on the way. Writers and Ray are gone in the end.

    Raises what `prepare_cache` raises, and EngineError where a teacher cannot go on writing.
    """
    if not any(recipe.authors(teacher) for teacher in teachers):
        return [prepare_cache(recipe, teacher) for teacher in teachers]
    with ThreadPoolExecutor(len(teachers)) as readers, Office(recipe, teachers, patience) as office:
        caches = [readers.submit(prepare_cache, recipe, teacher, office.answerer(teacher)) for teacher in teachers]
        while waiting := wait(caches, TICK_S, FIRST_EXCEPTION).not_done:
            if any(cache.exception() for cache in set(caches) - waiting):
                break
            office.hire()
        failed = [error for cache in caches if cache.done() and (error := cache.exception())]
    if failed:
        raise failed[0]
    return [cache.result() for cache in caches]


class Office:
    """The desks of all teachers that write, in one Ray session that starts when the first of them has work."""

    def __init__(self, recipe: Recipe, readers: Sequence[TeacherSpec], patience: Patience | None) -> None:
        self._recipe, self._patience = recipe, patience
        authors = {author.name: author for reader in readers for author in recipe.authors(reader)}
        self._desks = {name: Desk(recipe, author, self) for name, author in authors.items()}
        self._stack = ExitStack()
        self.queued: dict[str, int] = dict.fromkeys(self._desks, 0)
        """Writers of each desk that wait for a place."""

    def __enter__(self) -> "Office":
        return self

    def __exit__(self, *exception: object) -> None:
        for desk in self._desks.values():
            desk.close()
        self._stack.close()

    def answerer(self, teacher: TeacherSpec) -> Answerer | None:
        """Who answers the prompts of what the teacher scores; None where it reads the corpus as it is."""
        desks = [self._desks[author.name] for author in self._recipe.authors(teacher)]
        return Reader(desks, capped=self._recipe.corpus.max_tokens is not None) if desks else None

    def hire(self) -> None:
        """Give clerks to desks that have work and none yet. In the main thread: Ray wants its signals there."""
        for desk in self._desks.values():
            if desk.has_work() and not desk.clerks:
                self._stack.enter_context(ray_session(self._recipe.cluster))
                desk.hire(self._patience)
            desk.beat()


class Reader:
    """Hands prompts to desks, and their answers on: batch by batch, and within each desk by desk, in order."""

    def __init__(self, desks: Sequence["Desk"], *, capped: bool) -> None:
        self._desks = desks
        self._ahead = BATCHES_AHEAD * max(d.teacher.replica_range[0] for d in desks) if capped else FREE_BATCHES_AHEAD

    def __call__(self, prompts: Iterator[Document]) -> Iterator[Document]:
        """See Answerer. Raises CorpusError for what is no prompt, and EngineError where a teacher cannot go on."""
        asked: deque[list[tuple[Desk, PromptBatch]]] = deque()
        for number in itertools.count():
            group = list(itertools.islice(prompts, BATCH_PROMPTS))
            if not group:
                break
            asked.append([(desk, desk.ask(number, group)) for desk in self._desks])
            if len(asked) > self._ahead:
                yield from self._take(asked.popleft())
        while asked:
            yield from self._take(asked.popleft())

    def _take(self, batches: list[tuple["Desk", PromptBatch]]) -> Iterator[Document]:
        for desk, batch in batches:
            yield from desk.answers(batch)


class Desk:
    """One teacher's batches, and the clerks that have them written. Its methods are for any thread."""

    def __init__(self, recipe: Recipe, teacher: TeacherSpec, office: Office) -> None:
        self.teacher = teacher
        self.closed = False
        self.clerks: list[Clerk] = []
        self.losses: Losses
        self.patience: Patience
        self.placement: Placement
        self.commission: Commission
        self._recipe, self._office = recipe, office
        self._store = Store.open(recipe.cache_uri(teacher.name))
        self._identity = teacher_identity(teacher, resolve_teacher_model(teacher)) | {
            "positions": recipe.max_model_len(teacher)
        }
        self._lock = threading.Lock()
        self._queue: deque[PromptBatch] = deque()
        self._written: dict[str, Future[None]] = {}
        self._asked = self._answered = 0
        self._lost = len(quarantined_prompts(self._store))
        self._spoke_s = time.monotonic()

    def ask(self, number: int, prompts: Sequence[Document]) -> PromptBatch:
        """Have the batch written, unless it is, or is asked for already."""
        batch = PromptBatch.of(number, prompts, self.teacher.name, self._identity)
        there = self._store.exists(batch.path)
        with self._lock:
            if batch.path not in self._written:
                self._written[batch.path] = Future()
                self._asked += len(batch.prompts)
                if there:
                    self._written[batch.path].set_result(None)
                else:
                    self._queue.append(batch)
        return batch

    def answers(self, batch: PromptBatch) -> list[Document]:
        """The answered documents, once they are written. Raises what kept them from it."""
        self._written[batch.path].result()
        documents = read_answers(self._store, batch.path)
        if documents is None:
            raise DamageError(f"answers {self._store.where(batch.path)}: there a moment ago, now gone")
        return documents

    def hire(self, patience: Patience | None) -> None:
        """As many clerks as replicas, where an empty cluster has room for all of their writers."""
        import ray

        from actors.clerk import Clerk
        from actors.scribe import Commission

        recipe, teacher, cluster = self._recipe, self.teacher, ray.cluster_resources()
        if teacher.sampling is None:
            return
        self.placement = placement_for(teacher, cluster)
        if recipe.cluster.address == "local":
            check_fits(teacher, self.placement, cluster)
        threads = threads_of(teacher, recipe, int(cluster.get("CPU", 1)))
        longest = recipe.max_model_len(teacher)
        self.commission = Commission(self._store.uri, teacher, teacher.sampling, threads, longest)
        replicas = min(teacher.replica_range[0], fitting(self.placement, cluster))
        self.patience = patience or Patience(BATCH_PROMPTS * teacher.sampling.max_tokens)
        self.losses = Losses(teacher.name, replicas, BATCH_PROMPTS, living_nodes)
        self.clerks = [Clerk(self) for _ in range(replicas)]
        for clerk in self.clerks:
            clerk.start()

    def has_work(self) -> bool:
        """Whether a batch is waiting to be written."""
        return bool(self._queue)

    def take(self) -> PromptBatch | None:
        """The next batch, if no other clerk was faster."""
        with self._lock:
            return self._queue.popleft() if self._queue else None

    def settle(self, batch: PromptBatch, outcome: Outcome) -> None:
        """The batch is written. Raises EngineError where more prompts are lost than the recipe allows."""
        with self._lock:
            self._answered += outcome.rows
            self._lost += outcome.casualties
            allowed = allowed_casualties(self._recipe.capture.quarantine_cap, self._asked)
        if self._lost > allowed:
            raise EngineError(
                f"teacher {self.teacher.name}: {self._lost} prompts quarantined, expected at most {allowed} of "
                f"{self._asked} (capture.quarantine_cap); see {self._store.where('quarantine')}"
            )
        self._written[batch.path].set_result(None)

    def fail(self, error: StillhouseError) -> None:
        """Nothing more will be written: whoever waits for an answer gets the error."""
        with self._lock:
            self.closed = True
            self._queue.clear()
            undone = [written for written in self._written.values() if not written.done()]
        for written in undone:
            written.set_exception(error)

    def close(self) -> None:
        """Let the writers go, and whoever still waits for them."""
        self.fail(EngineError(f"teacher {self.teacher.name}: stopped before its answers were written"))
        for clerk in self.clerks:
            clerk.join()
        if self._answered:
            print(f"generate {self.teacher.name}: {self._answered} prompts answered", flush=True)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While a writer waits for its place, others that are idle give theirs up."""
        self._wait(+1)
        try:
            yield
        finally:
            self._wait(-1)

    def others_wait(self) -> bool:
        """Whether writers of other desks wait for a place."""
        return any(count for name, count in self._office.queued.items() if name != self.teacher.name)

    def beat(self) -> None:
        """Once in half a minute: how far it is."""
        if self.clerks and time.monotonic() - self._spoke_s > HEARTBEAT_S:
            self._spoke_s = time.monotonic()
            print(f"generate {self.teacher.name}: {self._answered} prompts answered so far", flush=True)

    def _wait(self, change: int) -> None:
        with self._lock:
            self._office.queued[self.teacher.name] += change
