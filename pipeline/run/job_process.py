"""The main function of a job's process."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import recipe_from_job_dict
from pipeline.errors import ExitCode, RecipeError, StillhouseError, UsageError
from pipeline.run.logs import configure_logging

logger = logging.getLogger(__name__)


def run_job(work: Callable[[dict[str, Any]], ExitCode | None], arguments: Sequence[str]) -> int:
    """Do the work that a job file describes; return the exit code. An expected error becomes one line.

    `arguments` is the path of one JSON file with a resolved `recipe` and the job's own keys.
    """
    job: dict[str, Any] = {}
    try:
        configure_logging()
        job = read_job_file(arguments)
        return int(work(job) or ExitCode.DONE)
    except StillhouseError as error:
        late = isinstance(error, RecipeError) and "origins" in job
        logger.error("%s", recipe_from_job_dict(job).add_location(str(error)) if late else error)
        return int(error.exit_code)
    except KeyboardInterrupt:
        logger.info("interrupted: the same command continues from here")
        return 130


def read_job_file(arguments: Sequence[str]) -> dict[str, Any]:
    """The content of the job file. Raises UsageError where it is no job file."""
    if len(arguments) != 1:
        raise UsageError("expected the path of one job file; jobs are started by: stillhouse run RECIPE")
    try:
        values = json.loads(Path(arguments[0]).read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"job {arguments[0]}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or "recipe" not in values:
        raise UsageError(f"job {arguments[0]}: expected an object with a recipe; jobs are started by: stillhouse run")
    return values
