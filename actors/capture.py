"""The capture job: teachers score the corpus and fill their caches.

`python -m actors.capture JOB.json` runs it, as `stillhouse capture` does. JOB.json holds `recipe` (a resolved recipe)
and `teacher`: a name, or null for all of them. The job is crash-only: it may be killed at any moment, and the same
command continues from what is committed.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actors.generate.answer_prompts import prepare_caches
from pipeline.cache import quarantine
from pipeline.cache.commit import committed_units, read_commit
from pipeline.cache.faithfulness import read_verdict
from pipeline.cache.storage.layout import FAITHFULNESS_JSON, MANIFEST_JSON, is_unit
from pipeline.cache.storage.store import Store
from pipeline.cache.storage.unit_ids import UnitIds
from pipeline.config import Recipe, TeacherSpec, recipe_from_job_dict
from pipeline.corpus.answers import quarantined_prompts
from pipeline.corpus.prepare import PreparedCache
from pipeline.errors import DamageError, ExitCode, UsageError
from pipeline.models.dtype import resolve_dtype
from pipeline.planning.throughput import add_throughput
from pipeline.run.job_process import run_job
from pipeline.run.ray_session import ray_session

if TYPE_CHECKING:
    from actors.replicas.pool import ReplicaPool
    from actors.replicas.timeouts import Timeouts
    from actors.scoring.scoring_work import ScoringWork


logger = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Run the job that a file describes, and return the exit code."""
    return run_job(lambda job: capture(*recipe_and_teachers(job)), arguments)


def recipe_and_teachers(job: Mapping[str, Any]) -> tuple[Recipe, list[TeacherSpec]]:
    """The recipe of a job and the teachers that it is for. Raises UsageError and RecipeError."""
    recipe, name = recipe_from_job_dict(job), job.get("teacher")
    try:
        return recipe, list(recipe.teachers) if name is None else [recipe.teacher_by_name(name)]
    except KeyError as error:
        raise UsageError(f"job of recipe {recipe.name}: expected one of its teachers, got {name!r}") from error


def capture(recipe: Recipe, teachers: Sequence[TeacherSpec]) -> ExitCode:
    """Prepare the caches, score what is pending, and report. INCOMPLETE: rows are in quarantine; FAILED: not usable.

    Raises UsageError before anything starts, and EngineError where a teacher cannot continue.
    """
    tasks = CaptureTask.all_of(recipe, teachers)
    for task in tasks:
        logger.info("%s", task.state_line())
    if unfinished := [task for task in tasks if not task.finished()]:
        warn_without_lm_head(recipe, unfinished)
        with ray_session(recipe.cluster):
            score_pending(recipe, unfinished)
    codes = {report(task) for task in tasks}
    return next((code for code in (ExitCode.FAILED, ExitCode.INCOMPLETE) if code in codes), ExitCode.DONE)


@dataclass(frozen=True)
class CaptureTask:
    """One teacher's cache and the units that it lacks."""

    teacher: TeacherSpec
    cache: PreparedCache
    pending: NDArray[np.int32]
    """Positions in `cache.unit_ids` of the units without a commit, in order."""

    @classmethod
    def all_of(cls, recipe: Recipe, teachers: Sequence[TeacherSpec]) -> "list[CaptureTask]":
        """Prepare the caches, unless they are prepared, and list their commits."""
        recipe = recipe.model_copy(update={"teachers": tuple(resolve_dtype(t, recipe) for t in recipe.teachers)})
        teachers = [recipe.teacher_by_name(teacher.name) for teacher in teachers]
        caches = prepare_caches(recipe, teachers)
        return [
            cls(teacher, cache, pending_positions(cache.store, cache.unit_ids))
            for teacher, cache in zip(teachers, caches, strict=True)
        ]

    def finished(self) -> bool:
        """Whether every unit is committed and the cache is checked."""
        store = self.cache.store
        return not len(self.pending) and store.exists(MANIFEST_JSON) and store.exists(FAITHFULNESS_JSON)

    def state_line(self) -> str:
        """How much is committed."""
        units = len(self.cache.unit_ids)
        done = units - len(self.pending)
        state = "done already" if self.finished() else f"{done} of {units} units committed"
        return f"capture {self.teacher.name}: {self.cache.tokens:,} tokens in {units} units, {state}"


def pending_positions(store: Store, unit_ids: UnitIds) -> NDArray[np.int32]:
    """Positions in `unit_ids` of the units without a commit, in order: four bytes per unit."""
    pending = np.ones(len(unit_ids), np.bool_)
    for unit_id in committed_units(store):
        if (position := unit_ids.index_of(unit_id)) is not None:
            pending[position] = False
    return np.flatnonzero(pending).astype(np.int32)


def warn_without_lm_head(recipe: Recipe, tasks: Sequence[CaptureTask]) -> None:
    """Warn before the capture that a student cannot be evaluated: that needs the LM head of its teacher."""
    evaluated = {student.from_teacher or recipe.teachers[0].name for student in recipe.all_students}
    for task in tasks:
        teacher, model = task.teacher, task.cache.model
        if teacher.name not in evaluated or teacher.engine == "dummy" or model is None:
            continue
        from actors.engines.lm_head import why_no_lm_head

        if why := why_no_lm_head(model, teacher.quantization):
            logger.warning(
                "teacher %s: its cache will hold no LM head, for %s: its students can be trained, and neither "
                "evaluated nor exported by `run`; capture a plain copy of the model for that",
                teacher.name,
                why,
            )


def score_pending(recipe: Recipe, tasks: Sequence[CaptureTask]) -> None:
    """Run one pool per teacher, all at once: Ray queues the replicas that do not fit yet."""
    from actors.replicas.pool import run_pools

    pools: list[ReplicaPool[ScoringWork]] = []
    try:
        pools += [create_pool(recipe, task) for task in tasks]
        run_pools(pools)
    finally:
        for pool in pools:
            work = pool.work
            if work.progress.tokens:
                add_throughput(work.store, work.progress.tokens, work.progress.seconds())
            if work.verdict is not None:
                work.store.put(FAITHFULNESS_JSON, work.verdict.to_bytes())
            logger.info("%s", summary_line(pool))


def create_pool(recipe: Recipe, task: CaptureTask, timeouts: "Timeouts | None" = None) -> "ReplicaPool[ScoringWork]":
    """Create the pool that fills the task's cache. Raises RecipeError where not one replica fits into the cluster."""
    from actors.replicas.metrics import PoolStats
    from actors.replicas.pool import ReplicaPool
    from actors.scoring.scoring_work import ScoringWork

    work = ScoringWork(recipe, task.teacher, task.cache, task.pending)
    return ReplicaPool(recipe, work, timeouts, PoolStats(quarantined=count_quarantined(work.store)))


def count_quarantined(store: Store) -> int:
    """Rows that the commits leave out. Reads only the commits of units that quarantine/ names."""
    units = {entry.unit_id for entry in quarantine.entries(store) if is_unit(entry.unit_id)}
    commits = (read_commit(store, unit_id) for unit_id in units)
    return sum(len(commit.quarantined) for commit in commits if commit is not None)


def summary_line(pool: "ReplicaPool[ScoringWork]") -> str:
    """What this run did, how fast, and what limited it."""
    stats, progress = pool.stats, pool.work.progress
    return (
        f"capture {pool.work.teacher.name}: {stats.items} units, {stats.tokens:,} tokens, "
        f"{progress.tokens_per_s():,.0f} tokens/s, {stats.bytes_per_token():.0f} bytes/token, "
        f"{stats.retries} retries, {stats.quarantined} quarantined; bottleneck: {stats.bottleneck()}"
    )


def report(task: CaptureTask) -> ExitCode:
    """Print whether the cache is usable and what is in quarantine, and return the exit code for it."""
    store, name = task.cache.store, task.teacher.name
    if (verdict := read_verdict(store)) is None:
        raise DamageError(f"{store.where(FAITHFULNESS_JSON)}: expected the capture's verdict, got nothing")
    logger.info("faithfulness %s: %s, %s", name, "usable" if verdict.usable else "NOT usable", verdict.why)
    lost = {"rows": count_quarantined(store), "prompts": len(quarantined_prompts(store))}
    for what, number in lost.items():
        if number:
            logger.warning("capture %s: %d %s in quarantine, see %s", name, number, what, store.where("quarantine"))
    if not verdict.usable:
        return ExitCode.FAILED
    return ExitCode.INCOMPLETE if any(lost.values()) else ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
