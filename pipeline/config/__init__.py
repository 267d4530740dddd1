"""Schema of the recipe (pydantic) and its loading from YAML. Imports nothing heavier than pydantic and PyYAML."""

from pipeline.config.capture import (
    CaptureSettings,
    CorpusSpec,
    PlacementSpec,
    SamplingSpec,
    TeacherSpec,
)
from pipeline.config.loader import load_recipe, recipe_from_dict, recipe_from_job_dict
from pipeline.config.recipe import ClusterSpec, Recipe
from pipeline.config.training import (
    DistributionSpec,
    EvaluationSpec,
    FeatureSpec,
    FusionSpec,
    LoraSpec,
    LossWeights,
    RelationSpec,
    Schedule,
    SelectionSpec,
    StudentSpec,
    TrainingSpec,
)

__all__ = [
    "CaptureSettings",
    "ClusterSpec",
    "CorpusSpec",
    "DistributionSpec",
    "EvaluationSpec",
    "FeatureSpec",
    "FusionSpec",
    "LoraSpec",
    "LossWeights",
    "PlacementSpec",
    "Recipe",
    "RelationSpec",
    "SamplingSpec",
    "Schedule",
    "SelectionSpec",
    "StudentSpec",
    "TeacherSpec",
    "TrainingSpec",
    "load_recipe",
    "recipe_from_dict",
    "recipe_from_job_dict",
]
