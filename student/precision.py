"""Which numbers a training computes with where the recipe leaves it to the machine."""

import json

from pipeline.precision import has_gpu, multiplies_bfloat16
from student.job import IDENTITY_JSON, Told


def decided(told: Told) -> Told:
    """The same training with `dtype: auto` replaced by what it began with, or by what suits this machine.

    bfloat16 where the hardware multiplies it, float32 elsewhere. What was decided is part of the training's identity,
    so one that has begun keeps it, whichever machine goes on with it. Raises StorageError.
    """
    training = told.recipe.training
    if training.dtype != "auto":
        return told
    gpus = training.gpus_per_worker
    fast = (has_gpu() if gpus is None else gpus > 0) or multiplies_bfloat16()
    dtype = _begun_with(told) or ("bfloat16" if fast else "float32")
    recipe = told.recipe.model_copy(update={"training": training.model_copy(update={"dtype": dtype})})
    return Told(recipe, told.student, told.arm)


def _begun_with(told: Told) -> str | None:
    data = told.store.read_if_present(IDENTITY_JSON)
    return None if data is None else str(json.loads(data)["training"]["dtype"])
