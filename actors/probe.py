"""The probe job: measures the throughput of one engine on a few units of the plan. Stores nothing.

`python -m actors.probe JOB.json` runs it, as `stillhouse plan --probe` does. JOB.json holds `recipe`, the name of a
`teacher`, and `answer`, the path that `{"tokens_per_s": ...}` is written to.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.capture import recipe_and_teachers
from actors.replicas.placement import threads_of
from actors.scoring.score_rows import score_rows
from pipeline.config import Recipe, TeacherSpec
from pipeline.contracts import Engine, Unit
from pipeline.corpus.prepare import resolve_teacher_model
from pipeline.corpus.windows import units_of
from pipeline.errors import EngineError
from pipeline.planning.token_counts import planned_sequences
from pipeline.run.job_process import run_job

UNITS = 2


def main(arguments: Sequence[str]) -> int:
    """Run the job that a file describes, and return the exit code."""
    return run_job(_probe_job, arguments)


def _probe_job(job: Mapping[str, Any]) -> None:
    recipe, (teacher,) = recipe_and_teachers(job)
    Path(job["answer"]).write_text(json.dumps({"tokens_per_s": probe(recipe, teacher)}))


def probe(recipe: Recipe, teacher: TeacherSpec) -> float:
    """Tokens per second of one replica after a warm-up. Raises what opening and scoring raise."""
    os.environ["OMP_NUM_THREADS"] = str(threads_of(teacher, recipe, os.cpu_count() or 1))
    from actors.engines import open_engine

    model = resolve_teacher_model(teacher)
    sequences = planned_sequences(recipe, teacher, model)
    units = list(itertools.islice(units_of(sequences, recipe.capture.unit_sequences), UNITS))
    engine = open_engine(teacher, model, recipe.capture.spec(recipe.seed), recipe.corpus.sequence_length)
    try:
        _time(engine, units[:1])  # engines compile and allocate memory at their first rows
        tokens, seconds = _time(engine, units)
    finally:
        engine.close()
    if not tokens:
        raise EngineError(f"teacher {teacher.name}: could not score any row of its first {len(units)} units")
    return tokens / seconds


def _time(engine: Engine, units: Sequence[Unit]) -> tuple[int, float]:
    started_s = time.monotonic()
    scored = [row for unit in units for row in score_rows(engine, unit.sequences)[0]]
    return sum(len(row.sequence.input_ids_N) for row in scored), time.monotonic() - started_s


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
