"""Which numbers a training computes with where the recipe leaves it to the machine."""

import json

from pipeline.models.dtype import cpu_supports_bfloat16, has_gpu
from student.training_job import IDENTITY_JSON, TrainingJob


def resolve_dtype(job: TrainingJob) -> TrainingJob:
    """The same training with `dtype: auto` replaced by what it began with, or by what suits this machine.

    bfloat16 where the hardware multiplies it, float32 elsewhere. What was decided is part of the training's identity,
    so one that has begun keeps it, whichever machine goes on with it. Raises StorageError.
    """
    training = job.recipe.training
    if training.dtype != "auto":
        return job
    gpus = training.gpus_per_worker
    fast = (has_gpu() if gpus is None else gpus > 0) or cpu_supports_bfloat16()
    dtype = _begun_with(job) or ("bfloat16" if fast else "float32")
    recipe = job.recipe.model_copy(update={"training": training.model_copy(update={"dtype": dtype})})
    return TrainingJob(recipe, job.student, job.arm)


def _begun_with(job: TrainingJob) -> str | None:
    data = job.store.read_if_present(IDENTITY_JSON)
    return None if data is None else str(json.loads(data)["training"]["dtype"])
