"""What a training starts from: what is read of the caches, the student and its losses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.cache.reader import CacheReader
from pipeline.config import Schedule
from pipeline.config.training import Coefficient
from student.batches import Reading, from_bfloat16
from student.bridge import bridge_gaps, gaps_between, read_first
from student.catalog import Rows
from student.distil import Distiller, Matching
from student.inherit import chosen_layers
from student.job import Told
from student.losses.features import channel_rms, layer_map
from student.model import Student, build_student, check_packing, head_spec, prepare
from student.order import Order

RMS_SEQUENCES = 16
"""Sequences from which the size of the teacher's channels is taken: the first of the catalog."""


def make_distiller(
    told: Told, caches: Sequence[CacheReader], rows: Rows, order: Order, device: torch.device
) -> Distiller:
    """The student as the recipe starts it, with its projections. Raises ModelError, RecipeError."""
    student = Student(build_student(told.spec, told.recipe, caches[0].spec.vocabulary)).to(device)
    check_packing(student)
    if told.arm == "student" and told.recipe.training.feature.bridge:
        _bridge(told, caches[0], rows, order, student)
    prepare(student, told.recipe.training)
    matching = Matching() if told.arm == "control" else make_matching(told, caches[0], rows, student)
    return Distiller(student, told.recipe.training, matching, head_spec(student.model.config)).to(device)


def make_reading(told: Told, caches: Sequence[CacheReader], distiller: Distiller) -> Reading:
    """What this arm reads of the caches: a control sees tokens and labels alone."""
    training = told.recipe.training
    return Reading(
        shards={teacher.name: cache.spec for teacher, cache in zip(told.recipe.teaching, caches, strict=True)},
        temperature=training.distribution.temperature,
        entries=told.arm == "student",
        hidden=bool(distiller.matching.layers),
        vocabulary=distiller.student.vocabulary,
        fusion=training.fusion,
    )


def make_matching(told: Told, cache: CacheReader, rows: Rows, student: Student) -> Matching:
    """Layers that are held against each other, for those of the two losses that the recipe asks for."""
    training, captured = told.recipe.training, cache.spec.capture.hidden_layers
    layers, inherited = (student.depth, cache.description.layers, captured), _inherited(told, cache)
    features = layer_map(*layers, training.feature.layer_map, inherited) if _asked(training.losses.feature) else {}
    relations = layer_map(*layers, training.relation.layer_map, inherited) if _asked(training.losses.relation) else {}
    rms_LE = _channel_rms(rows, len(captured)) if features or relations else None
    return Matching(captured, features, relations, rms_LE)


def _bridge(told: Told, cache: CacheReader, rows: Rows, order: Order, student: Student) -> None:
    inherited = _inherited(told, cache)
    assert inherited is not None  # the recipe has been checked
    captured = cache.spec.capture.hidden_layers
    bridge_gaps(student, gaps_between(inherited, captured), rows, read_first(order, rows), captured)


def _inherited(told: Told, cache: CacheReader) -> tuple[int, ...] | None:
    """Which layers of the captured teacher, the recipe's first, the student was made of; None where of none."""
    if told.spec.from_teacher != told.recipe.teaching[0].name:
        return None
    return chosen_layers(told.spec.layers or 1, cache.description.layers)


def _asked(coefficient: Coefficient) -> bool:
    return (coefficient.value if isinstance(coefficient, Schedule) else coefficient) != 0.0


def _channel_rms(rows: Rows, layers: int) -> Tensor:
    """[L, E] from the first sequences of the catalog: the same for every rank and after every resume."""
    views = (rows[number][0].signals.hidden_TLD for number in range(min(RMS_SEQUENCES, len(rows.catalog))))
    hidden_RLE = torch.cat([from_bfloat16(view) for view in views if view is not None])
    return torch.stack([channel_rms([hidden_RLE[:, layer]]) for layer in range(layers)])
