"""Builds what a training starts from: student, projections, layer map, and the collate function's settings."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.cache.reader import CacheReader
from pipeline.config import Schedule
from pipeline.config.training import Coefficient
from student.data.batch_sampler import BatchSampler
from student.data.collate import CollateSpec, from_bfloat16
from student.data.dataset import CacheDataset
from student.loop.distiller import Distiller, LayerMap
from student.losses.features import channel_rms, match_layers
from student.model.build import Student, build_student, check_packing, head_spec, prepare_for_training
from student.model.layer_gaps import calibration_sequences, fill_layer_gaps, layer_gaps
from student.model.prune import resolve_layers
from student.training_job import TrainingJob

RMS_SEQUENCES = 16
"""Number of sequences, the first of the dataset, from which the RMS of the teacher's channels is computed."""


def make_distiller(
    job: TrainingJob,
    caches: Sequence[CacheReader],
    dataset: CacheDataset,
    batch_sampler: BatchSampler,
    device: torch.device,
) -> Distiller:
    """Build the student with its initial weights, and its projections. Raises ModelError, RecipeError."""
    student = Student(build_student(job.spec, job.recipe, caches[0].spec.vocabulary)).to(device)
    check_packing(student)
    if job.arm == "student" and job.recipe.training.feature.layer_gap_least_squares:
        copied, captured = _copied_layers(job, caches[0]), caches[0].spec.capture.hidden_layers
        assert copied is not None  # checked with the recipe
        sequences = calibration_sequences(batch_sampler, dataset)
        fill_layer_gaps(student, layer_gaps(copied, captured), dataset, sequences, captured)
    prepare_for_training(student, job.recipe.training)
    layer_map = LayerMap() if job.arm == "control" else make_layer_map(job, caches[0], dataset, student)
    return Distiller(student, job.recipe.training, layer_map, head_spec(student.model.config)).to(device)


def make_collate_spec(job: TrainingJob, caches: Sequence[CacheReader], distiller: Distiller) -> CollateSpec:
    """What the collate function reads from the caches: tokens and labels only for a control."""
    training = job.recipe.training
    return CollateSpec(
        shards={teacher.name: cache.spec for teacher, cache in zip(job.recipe.training_teachers, caches, strict=True)},
        temperature=training.distribution.temperature,
        entries=job.arm == "student",
        hidden=bool(distiller.layer_map.layers),
        vocabulary=distiller.student.vocabulary,
        fusion=training.fusion,
    )


def make_layer_map(job: TrainingJob, cache: CacheReader, dataset: CacheDataset, student: Student) -> LayerMap:
    """Layer pairs of the feature and the relation loss; none for a loss whose coefficient is 0."""
    training, captured = job.recipe.training, cache.spec.capture.hidden_layers
    layers, copied = (student.depth, cache.description.layers, captured), _copied_layers(job, cache)
    features = match_layers(*layers, training.feature.layer_map, copied) if _is_used(training.losses.feature) else {}
    relations = match_layers(*layers, training.relation.layer_map, copied) if _is_used(training.losses.relation) else {}
    rms_LE = _channel_rms(dataset, len(captured)) if features or relations else None
    return LayerMap(captured, features, relations, rms_LE)


def _copied_layers(job: TrainingJob, cache: CacheReader) -> tuple[int, ...] | None:
    """Teacher layers that the student copies, if `from_teacher` is the first training teacher; else None."""
    if job.spec.from_teacher != job.recipe.training_teachers[0].name:
        return None
    return resolve_layers(job.spec.layers or 1, cache.description.layers)


def _is_used(coefficient: Coefficient) -> bool:
    return (coefficient.value if isinstance(coefficient, Schedule) else coefficient) != 0.0


def _channel_rms(dataset: CacheDataset, layers: int) -> Tensor:
    """[L, E], from the first sequences of the dataset: equal on every rank and after a resume."""
    states = (dataset[number][0].signals.hidden_TLD for number in range(min(RMS_SEQUENCES, len(dataset))))
    hidden_TLE = torch.cat([from_bfloat16(one_TLE) for one_TLE in states if one_TLE is not None])
    return torch.stack([channel_rms(hidden_TLE[:, layer]) for layer in range(layers)])
