"""What a training starts from: what is read of the caches, the student and its losses."""

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
"""Sequences from which the size of the teacher's channels is taken: the first of the dataset."""


def make_distiller(
    job: TrainingJob,
    caches: Sequence[CacheReader],
    dataset: CacheDataset,
    batch_sampler: BatchSampler,
    device: torch.device,
) -> Distiller:
    """The student as the recipe starts it, with its projections. Raises ModelError, RecipeError."""
    student = Student(build_student(job.spec, job.recipe, caches[0].spec.vocabulary)).to(device)
    check_packing(student)
    if job.arm == "student" and job.recipe.training.feature.layer_gap_least_squares:
        _solve_layer_gaps(job, caches[0], dataset, batch_sampler, student)
    prepare_for_training(student, job.recipe.training)
    matching = LayerMap() if job.arm == "control" else make_layer_map(job, caches[0], dataset, student)
    return Distiller(student, job.recipe.training, matching, head_spec(student.model.config)).to(device)


def make_collate_spec(job: TrainingJob, caches: Sequence[CacheReader], distiller: Distiller) -> CollateSpec:
    """What this arm reads of the caches: a control sees tokens and labels alone."""
    training = job.recipe.training
    return CollateSpec(
        shards={teacher.name: cache.spec for teacher, cache in zip(job.recipe.training_teachers, caches, strict=True)},
        temperature=training.distribution.temperature,
        entries=job.arm == "student",
        hidden=bool(distiller.matching.layers),
        vocabulary=distiller.student.vocabulary,
        fusion=training.fusion,
    )


def make_layer_map(job: TrainingJob, cache: CacheReader, dataset: CacheDataset, student: Student) -> LayerMap:
    """Layers that are held against each other, for those of the two losses that the recipe asks for."""
    training, captured = job.recipe.training, cache.spec.capture.hidden_layers
    layers, inherited = (student.depth, cache.description.layers, captured), _inherited(job, cache)
    features = match_layers(*layers, training.feature.layer_map, inherited) if _asked(training.losses.feature) else {}
    relations = (
        match_layers(*layers, training.relation.layer_map, inherited) if _asked(training.losses.relation) else {}
    )
    rms_LE = _channel_rms(dataset, len(captured)) if features or relations else None
    return LayerMap(captured, features, relations, rms_LE)


def _solve_layer_gaps(
    job: TrainingJob, cache: CacheReader, dataset: CacheDataset, batch_sampler: BatchSampler, student: Student
) -> None:
    inherited = _inherited(job, cache)
    assert inherited is not None  # the recipe has been checked
    captured = cache.spec.capture.hidden_layers
    fill_layer_gaps(
        student, layer_gaps(inherited, captured), dataset, calibration_sequences(batch_sampler, dataset), captured
    )


def _inherited(job: TrainingJob, cache: CacheReader) -> tuple[int, ...] | None:
    """Which layers of the captured teacher, the recipe's first, the student was made of; None where of none."""
    if job.spec.from_teacher != job.recipe.training_teachers[0].name:
        return None
    return resolve_layers(job.spec.layers or 1, cache.description.layers)


def _asked(coefficient: Coefficient) -> bool:
    return (coefficient.value if isinstance(coefficient, Schedule) else coefficient) != 0.0


def _channel_rms(dataset: CacheDataset, layers: int) -> Tensor:
    """[L, E] from the first sequences of the dataset: the same for every rank and after every resume."""
    views = (dataset[number][0].signals.hidden_TLD for number in range(min(RMS_SEQUENCES, len(dataset))))
    hidden_TLE = torch.cat([from_bfloat16(view) for view in views if view is not None])
    return torch.stack([channel_rms([hidden_TLE[:, layer]]) for layer in range(layers)])
