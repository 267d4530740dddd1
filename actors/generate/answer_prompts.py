"""`generate` mode: before caches are prepared, teachers answer the prompts of the corpus and store the answers.

A thread per cache reads the prompts, requests answers in batches and tokenises them; the main thread runs the pools
that generate. All teachers generate at once, side by side where resources allow. The Ray session is over, and its
memory free, before any engine opens to score. Answers that are stored already are not generated again, so an
interrupted run continues; when none is missing, Ray is not started. Answers are requested as they are read: beyond
`corpus.max_tokens` none is generated.
"""

import itertools
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial

from actors.generate.generation_work import BATCH_PROMPTS, GenerationWork
from actors.replicas.timeouts import Timeouts
from pipeline.config import Recipe, TeacherSpec
from pipeline.contracts import Document
from pipeline.corpus.answers import Answerer, PromptBatch, quarantined_prompts
from pipeline.corpus.prepare import PreparedCache, prepare_cache
from pipeline.errors import EngineError
from pipeline.run.ray_session import ray_session

BATCHES_AHEAD = 2
"""Batches per replica that are requested ahead of the one that is read, where the corpus has a cap."""
UNCAPPED_BATCHES_AHEAD = 32
"""Batches requested ahead where the corpus has no cap, so that every prompt will be answered."""
TICK_S = 0.2
logger = logging.getLogger(__name__)


def prepare_caches(
    recipe: Recipe, teachers: Sequence[TeacherSpec], timeouts: Timeouts | None = None
) -> list[PreparedCache]:
    """Prepare every teacher's cache; generate the answers that it needs. No actor is left afterwards.

    Raises what `prepare_cache` raises, and EngineError where a teacher cannot generate.
    """
    authors = {author.name: author for teacher in teachers for author in recipe.authors(teacher)}
    works = {name: GenerationWork(recipe, a, a.sampling) for name, a in authors.items() if a.sampling is not None}
    if not works:
        return [prepare_cache(recipe, teacher) for teacher in teachers]
    with ThreadPoolExecutor(len(teachers)) as readers:
        caches = [readers.submit(prepare_cache, recipe, t, answerer(recipe, t, works)) for t in teachers]
        try:
            run_generation(recipe, list(works.values()), caches, timeouts)
            for error in [cache.exception() for cache in caches if cache.done()]:
                if error is not None:
                    raise error
            return [cache.result() for cache in caches]
        finally:
            for name, work in works.items():
                work.fail(EngineError(f"teacher {name}: stopped before all of its answers were written"))
                work.progress.close()


def run_generation(
    recipe: Recipe,
    works: Sequence[GenerationWork],
    caches: Sequence[Future[PreparedCache]],
    timeouts: Timeouts | None,
) -> None:
    """Generate until all caches are prepared or one failed. Runs in the main thread, where Ray handles signals."""

    def finish(done: Future[PreparedCache]) -> None:
        if done.exception() or all(cache.done() for cache in caches):
            for work in works:
                work.finished = True

    for cache in caches:
        cache.add_done_callback(finish)
    while not any(work.queue for work in works):
        if any(work.finished for work in works):
            return
        wait(caches, TICK_S, FIRST_EXCEPTION)
    with ray_session(recipe.cluster):
        from actors.replicas.metrics import PoolStats
        from actors.replicas.pool import ReplicaPool, run_pools

        lost = [len(quarantined_prompts(work.store)) for work in works]
        pools = [ReplicaPool(recipe, w, timeouts, PoolStats(quarantined=n)) for w, n in zip(works, lost, strict=True)]
        try:
            run_pools(pools)
        finally:
            for pool in pools:
                if rows := pool.stats.rows:
                    counts = f"{pool.stats.retries} retries, {pool.stats.quarantined} quarantined"
                    logger.info("generate %s: %d prompts answered, %s", pool.work.teacher.name, rows, counts)


def answerer(recipe: Recipe, teacher: TeacherSpec, works: dict[str, GenerationWork]) -> Answerer | None:
    """Return what turns prompts into the documents that the teacher scores; None where it scores the corpus itself."""
    authors = [works[author.name] for author in recipe.authors(teacher)]
    if not authors:
        return None
    ahead = BATCHES_AHEAD * max(author.teacher.replica_range[0] for author in authors)
    return partial(answer_prompts, authors, UNCAPPED_BATCHES_AHEAD if recipe.corpus.max_tokens is None else ahead)


def answer_prompts(authors: Sequence[GenerationWork], ahead: int, prompts: Iterator[Document]) -> Iterator[Document]:
    """Request answers batch by batch from every author, and yield them in order: by batch, then by author.

    Raises CorpusError for a document that is no prompt, and EngineError.
    """
    requested: deque[list[PromptBatch]] = deque()
    for number in itertools.count():
        group = list(itertools.islice(prompts, BATCH_PROMPTS))
        if group:
            requested.append([author.request(number, group) for author in authors])
        while requested and (not group or len(requested) > ahead):
            for author, batch in zip(authors, requested.popleft(), strict=True):
                yield from author.answers(batch)
        if not group:
            return
