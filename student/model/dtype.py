"""Resolve `training.dtype: auto`."""

import json

from pipeline.models.dtype import cpu_supports_bfloat16, has_gpu
from student.training_job import IDENTITY_JSON, TrainingJob


def resolve_dtype(job: TrainingJob) -> TrainingJob:
    """Return the job with `dtype: auto` replaced by the stored dtype of a started training, or by this machine's.

    This machine's is bfloat16 if its hardware multiplies bfloat16, otherwise float32. The dtype is part of the
    training's identity, so a started training keeps it on every machine. Raises StorageError.
    """
    training = job.recipe.training
    if training.dtype != "auto":
        return job
    gpus = training.gpus_per_worker
    fast_bfloat16 = (has_gpu() if gpus is None else gpus > 0) or cpu_supports_bfloat16()
    dtype = _stored_dtype(job) or ("bfloat16" if fast_bfloat16 else "float32")
    recipe = job.recipe.model_copy(update={"training": training.model_copy(update={"dtype": dtype})})
    return TrainingJob(recipe, job.student, job.arm)


def _stored_dtype(job: TrainingJob) -> str | None:
    data = job.store.read_if_present(IDENTITY_JSON)
    return None if data is None else str(json.loads(data)["training"]["dtype"])
