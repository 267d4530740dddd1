"""The capture job: teachers read the corpus, and their caches fill.

`python -m actors.capture JOB.json` runs it, as `stillhouse capture` does. JOB.json holds `recipe` (a resolved recipe)
and `teacher`: a name, or null for all of them. The job is crash-only: it may be killed at any moment, and the same
command goes on from what is committed.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actors.answers import prepare_caches
from actors.backlog import Backlog, pending_places
from actors.rows import allowed_casualties
from pipeline.cache import quarantine
from pipeline.cache.commit import read_commit
from pipeline.cache.faithfulness import read_verdict
from pipeline.cache.storage.layout import FAITHFULNESS_JSON, MANIFEST_JSON, is_unit
from pipeline.cache.storage.store import Store
from pipeline.config import Recipe, TeacherSpec, recipe_from_job_dict
from pipeline.corpus.answers import quarantined_prompts
from pipeline.corpus.prepare import PreparedCache
from pipeline.errors import DamageError, ExitCode, StillhouseError, UsageError
from pipeline.models.dtype import resolve_dtype
from pipeline.planning.throughput import add_throughput
from pipeline.run.ray_session import ray_session

if TYPE_CHECKING:
    from actors.patience import Patience
    from actors.supervise import Crew


def main(arguments: Sequence[str]) -> int:
    """Run the job that a file describes; answer with the exit code."""
    try:
        recipe, teachers = read_job(arguments)
        return int(capture(recipe, teachers))
    except StillhouseError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130


def read_job(arguments: Sequence[str]) -> tuple[Recipe, list[TeacherSpec]]:
    """The recipe and its teachers that a job file names. Raises UsageError and RecipeError."""
    if len(arguments) != 1:
        raise UsageError("usage: python -m actors.capture JOB.json, as `stillhouse capture RECIPE` starts it")
    try:
        job = json.loads(Path(arguments[0]).read_text())
        recipe, name = recipe_from_job_dict(job), job.get("teacher")
        return recipe, list(recipe.teachers) if name is None else [recipe.teacher_by_name(name)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"job {arguments[0]}: expected a recipe and one of its teachers, got {error!r}") from error


def capture(recipe: Recipe, teachers: Sequence[TeacherSpec]) -> ExitCode:
    """Fill the teachers' caches. Answers INCOMPLETE where rows are in quarantine, FAILED where a cache is unusable.

    Raises UsageError and its kin before anything starts, and EngineError where a teacher cannot go on.
    """
    tasks = Task.all_of(recipe, teachers)
    for task in tasks:
        print(task.opening_line(), flush=True)
    if unfinished := [task for task in tasks if not task.finished()]:
        warn_of_what_cannot_be_measured(recipe, unfinished)
        with ray_session(recipe.cluster):
            run_crews(recipe, unfinished)
    codes = {conclude(task) for task in tasks}
    return next((code for code in (ExitCode.FAILED, ExitCode.INCOMPLETE) if code in codes), ExitCode.DONE)


def warn_of_what_cannot_be_measured(recipe: Recipe, tasks: Sequence["Task"]) -> None:
    """Say now what the evaluation would refuse hours later: a student is measured through its teacher's LM head."""
    measured = {student.from_teacher or recipe.teachers[0].name for student in recipe.all_students}
    for task in tasks:
        teacher, model = task.teacher, task.cache.model
        if teacher.name not in measured or teacher.engine == "dummy" or model is None:
            continue
        from actors.engines.lm_head import why_no_lm_head

        if why := why_no_lm_head(model, teacher.quantization):
            print(
                f"warning: teacher {teacher.name}: its cache will hold no LM head, for {why}: its students can be "
                "trained, and neither evaluated nor exported by `run`; capture a plain copy of the model for that",
                flush=True,
            )


@dataclass(frozen=True)
class Task:
    """One teacher's cache, and what it still lacks."""

    teacher: TeacherSpec
    cache: PreparedCache
    pending: NDArray[np.int32]
    """Places in `cache.unit_ids` of the units without a commit, in order."""

    @classmethod
    def of(cls, recipe: Recipe, teacher: TeacherSpec) -> "Task":
        """See `all_of`."""
        return cls.all_of(recipe, [teacher])[0]

    @classmethod
    def all_of(cls, recipe: Recipe, teachers: Sequence[TeacherSpec]) -> list["Task"]:
        """Prepare the caches, or find them prepared, and see what is committed."""
        recipe = recipe.model_copy(update={"teachers": tuple(resolve_dtype(t, recipe) for t in recipe.teachers)})
        teachers = [recipe.teacher_by_name(teacher.name) for teacher in teachers]
        caches = prepare_caches(recipe, teachers)
        return [
            cls(teacher, cache, pending_places(cache.store, cache.unit_ids))
            for teacher, cache in zip(teachers, caches, strict=True)
        ]

    def finished(self) -> bool:
        """Nothing is pending, and the cache is judged."""
        store = self.cache.store
        return not len(self.pending) and store.exists(MANIFEST_JSON) and store.exists(FAITHFULNESS_JSON)

    def opening_line(self) -> str:
        """What is there and what is to do."""
        units = len(self.cache.unit_ids)
        done = units - len(self.pending)
        state = "done already" if self.finished() else f"{done} of {units} units committed"
        return f"capture {self.teacher.name}: {self.cache.tokens:,} tokens in {units} units, {state}"


def run_crews(recipe: Recipe, tasks: Sequence[Task]) -> None:
    """One crew a teacher, all at once: Ray queues those for which there is no room yet."""
    from actors.supervise import supervise

    crews = [make_crew(recipe, task) for task in tasks]
    try:
        supervise(crews)
    finally:
        for task, crew in zip(tasks, crews, strict=True):
            if crew.progress.tokens:
                add_throughput(task.cache.store, crew.progress.tokens, crew.progress.seconds())
            if crew.verdict is not None:
                task.cache.store.put(FAITHFULNESS_JSON, crew.verdict.to_bytes())
            print(summary_line(task.teacher.name, crew), flush=True)


def make_crew(recipe: Recipe, task: Task, patience: "Patience | None" = None) -> "Crew":
    """The crew that will fill the task's cache. Raises RecipeError where not one replica fits into the cluster."""
    import ray

    from actors.losses import Losses
    from actors.patience import Patience
    from actors.placement import living_nodes, threads_of
    from actors.supervise import Crew
    from actors.teacher import Posting
    from pipeline.planning.resources import check_fits, placement_for
    from pipeline.run.progress import Progress

    teacher, store = task.teacher, task.cache.store
    placement = placement_for(teacher, ray.cluster_resources())
    if recipe.cluster.address == "local":
        check_fits(teacher, placement, ray.cluster_resources())
    threads = threads_of(teacher, recipe, int(ray.cluster_resources().get("CPU", 1)))
    units, unit_sequences = len(task.cache.unit_ids), recipe.capture.unit_sequences
    return Crew(
        Posting(store.uri, teacher, recipe.capture.spec(recipe.seed), threads, recipe.corpus.sequence_length),
        placement,
        Backlog(task.cache.unit_ids, task.pending),
        patience=patience or Patience(unit_sequences * recipe.corpus.sequence_length),
        losses=Losses(teacher.name, teacher.replica_range[1], unit_sequences, living_nodes),
        allowed_casualties=allowed_casualties(recipe.capture.quarantine_cap, units * unit_sequences),
        casualties=quarantined(store),
        progress=Progress(f"capture {teacher.name}", units, units - len(task.pending)),
    )


def quarantined(store: Store) -> int:
    """Rows that the commits leave out. Only the commits of units that the quarantine names are opened."""
    units = {entry.unit_id for entry in quarantine.entries(store) if is_unit(entry.unit_id)}
    commits = (read_commit(store, unit_id) for unit_id in units)
    return sum(len(commit.quarantined) for commit in commits if commit is not None)


def summary_line(name: str, crew: "Crew") -> str:
    """What this run did and what it waited for."""
    ledger, pace = crew.ledger, crew.progress.tokens_per_s()
    return (
        f"capture {name}: {ledger.units} units, {ledger.tokens:,} tokens, {pace:,.0f} tokens/s, "
        f"{ledger.bytes_per_token():.0f} bytes/token, {ledger.retries} retries, {ledger.casualties} quarantined; "
        f"bottleneck: {ledger.bottleneck()}"
    )


def conclude(task: Task) -> ExitCode:
    """Say how the cache stands, and what that means for the exit code."""
    store, name = task.cache.store, task.teacher.name
    if (verdict := read_verdict(store)) is None:
        raise DamageError(f"{store.where(FAITHFULNESS_JSON)}: expected the capture's verdict, got nothing")
    print(f"faithfulness {name}: {'usable' if verdict.usable else 'NOT usable'}, {verdict.why}", flush=True)
    lost = {"rows": quarantined(store), "prompts": len(quarantined_prompts(store))}
    for what, number in lost.items():
        if number:
            print(f"capture {name}: {number} {what} in quarantine, see {store.where('quarantine')}", flush=True)
    if not verdict.usable:
        return ExitCode.FAILED
    return ExitCode.INCOMPLETE if any(lost.values()) else ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
