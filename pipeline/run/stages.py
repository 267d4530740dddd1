"""The stages of a run, each in processes of its own.

A job's process holds what that job needs and nothing else: when a training starts, the teachers' processes have ended
and their memory is free. A second start of the same command finds what is done in the storage.
"""

import json
import logging
import signal
import time
from collections.abc import Sequence

from pipeline.cache.storage.store import Store
from pipeline.config import Recipe
from pipeline.errors import ExitCode
from pipeline.run.jobs import STAGES, Job, jobs_of
from pipeline.run.launch import launch
from pipeline.run.outputs import REPORT_TXT

logger = logging.getLogger(__name__)


def run(recipe: Recipe, stages: Sequence[str] = STAGES) -> ExitCode:
    """Run the jobs of the stages that are not done yet, in order; the first that fails ends the run.

    Returns the failed job's exit code, INCOMPLETE where rows are in quarantine, otherwise DONE. Raises StorageError
    where the run's storage cannot be written to.
    """
    store = Store.open(recipe.storage)
    jobs = [job for job in jobs_of(recipe) if job.stage in stages]
    logger.info("run %s: %d job%s, storage %s", recipe.name, len(jobs), "s" if len(jobs) != 1 else "", recipe.storage)
    worst = ExitCode.DONE
    for number, job in enumerate(jobs, 1):
        code = _run_job(store, job, f"[{number}/{len(jobs)}] {job.name}")
        if number == 1 and code is not ExitCode.USAGE:  # a recipe that is refused does not replace the run's own
            store.put("recipe.json", (json.dumps(recipe.to_dict(), indent=2) + "\n").encode())
        if code not in (ExitCode.DONE, ExitCode.INCOMPLETE):
            return code
        worst = max(worst, code)
    if store.exists(REPORT_TXT):
        print(store.read(REPORT_TXT).decode(), flush=True)
    return worst


def _run_job(store: Store, job: Job, title: str) -> ExitCode:
    if job.is_done(store):
        logger.info("%s: done already", title)
        return ExitCode.DONE
    logger.info("%s: starts", title)
    started_s = time.monotonic()
    code = launch(job)
    seconds = time.monotonic() - started_s
    missing = [file for file in job.outputs if not store.exists(file)] if code == ExitCode.DONE else []
    outcome = f"failed: it did not write {store.where(missing[0])}" if missing else _outcome(code)
    logger.info("%s: %s after %.0f s", title, outcome, seconds)
    if missing or code not in set(ExitCode):
        return ExitCode.FAILED
    if code == ExitCode.DONE:
        job.record(store, seconds)
    return ExitCode(code)


def _outcome(code: int) -> str:
    if code < 0:
        return f"killed by signal {-code}{' (out of memory?)' if code == -signal.SIGKILL else ''}"
    return {0: "done", 3: "incomplete"}.get(code, f"failed (exit code {code})")
