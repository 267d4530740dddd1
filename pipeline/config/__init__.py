"""Schema of the recipe (pydantic) and its loading from YAML. Imports nothing heavier than pydantic and PyYAML."""

from pipeline.config.capture import CorpusSpec, TeacherSpec
from pipeline.config.loader import load_recipe, recipe_from_dict, recipe_from_job_dict
from pipeline.config.recipe import ClusterSpec, Recipe
from pipeline.config.training import (
    DistributionSpec,
    FusionSpec,
    LoraSpec,
    LossWeights,
    Schedule,
    StudentSpec,
    TrainingSpec,
)

__all__ = [
    "ClusterSpec",
    "CorpusSpec",
    "DistributionSpec",
    "FusionSpec",
    "LoraSpec",
    "LossWeights",
    "Recipe",
    "Schedule",
    "StudentSpec",
    "TeacherSpec",
    "TrainingSpec",
    "load_recipe",
    "recipe_from_dict",
    "recipe_from_job_dict",
]
