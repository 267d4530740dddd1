"""Forward pass of distillation as one module: packed micro-batch in, sums of the losses out.

DDP and FSDP2 wrap this module, so that every use of a weight is inside one forward pass: decoder layers, LM head
(inside the chunked loss), and the projections, which are trained but not part of the student.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.config import TrainingSpec
from student.data.collate import MicroBatch
from student.head.chunked import HeadLoss, HeadSpec, head_loss
from student.head.row_statistics import row_statistics
from student.losses.features import Projections, feature_loss
from student.losses.registry import resolve_schedules
from student.losses.relations import relation_loss
from student.losses.schedules import coefficient_at
from student.losses.selection import PackedSequences, select
from student.model.build import States, Student

PARTS = ("kd", "ce", "feature", "relation")
"""Names of the losses, in the order of `parts_P`."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Coefficients of the losses in one step. The defaults are those of a control: cross-entropy only."""

    kd: float = 0.0
    ce: float = 1.0
    feature: float = 0.0
    relation: float = 0.0
    step: int = 0
    steps: int = 1
    """Step number and length of the run, for schedules within the distillation loss."""


def coefficients_at(training: TrainingSpec, step: int, steps: int) -> Coefficients:
    """Resolve the recipe's schedules at step `step` of `steps`."""
    parts = {part: coefficient_at(getattr(training.losses, part), step, steps) for part in PARTS}
    return Coefficients(**parts, step=step, steps=steps)


@dataclass(frozen=True, slots=True)
class LayerMap:
    """Pairs of student and teacher layers for the losses between hidden states.

    Layers are numbered as in pipeline/contracts.py; `features` and `relations` map the student's to the teacher's.
    """

    captured: tuple[int, ...] = ()
    """Captured teacher layers, in the order of `hidden_TLE`."""
    features: Mapping[int, int] = field(default_factory=dict)
    relations: Mapping[int, int] = field(default_factory=dict)
    rms_LE: Tensor | None = None
    """Root mean square of every channel of each captured layer."""

    @property
    def layers(self) -> list[int]:
        """Student layers whose hidden states the losses need."""
        return sorted({*self.features, *self.relations})


class Distiller(nn.Module):
    """Student, projections and losses."""

    def __init__(self, student: Student, training: TrainingSpec, layer_map: LayerMap, head: HeadSpec) -> None:
        super().__init__()
        self.student = student
        self.projections = _make_projections(student.width, layer_map)
        self.layer_map = layer_map
        self._training, self._head = training, head

    def forward(self, batch: MicroBatch, coefficients: Coefficients) -> tuple[Tensor, Tensor]:
        """(total, parts_P): sum over rows and losses with coefficients and gradient; sums of PARTS without either."""
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self._training.dtype == "bfloat16"):
            last_ND, states = self.student.states(batch.input_ids_N, batch.position_ids_N, self.layer_map.layers)
        head = self._head_loss(last_ND[batch.row_T], batch, coefficients)
        feature, relation = self._hidden_state_losses(states, batch)
        balanced = feature * self.projections.balance.to(feature.dtype) if self._training.feature.balance else feature
        total = head.total + coefficients.relation * relation + coefficients.feature * balanced
        return total, torch.stack([head.parts["kd"], head.parts["ce"], feature.detach(), relation.detach()])

    def rebalance(self, parts: Mapping[str, float], coefficients: Coefficients) -> None:
        """Set the factor that gives the next step's feature loss the size of the output loss.

        `parts`: means over the step. The factor is constant within a step: one per micro-batch would make the gradient
        depend on the packing.
        """
        kd = coefficients.kd * self._training.distribution.temperature**2
        output, feature = kd * parts["kd"] + coefficients.ce * parts["ce"], parts["feature"]
        if output > 0.0 and feature > 0.0:
            self.projections.balance.fill_(output / feature)

    def _head_loss(self, hidden_TD: Tensor, batch: MicroBatch, coefficients: Coefficients) -> HeadLoss:
        if self._training.dtype == "bfloat16":
            hidden_TD = hidden_TD.bfloat16()
        weight_VD, bias_V = self.student.head()
        spec = replace(
            self._head,
            kd=coefficients.kd,
            ce=coefficients.ce,
            distribution=resolve_schedules(self._training.distribution, coefficients.step, coefficients.steps),
            kernel=self._training.head_kernel,
        )
        targets, rows = batch.targets, self._training.chunk_rows
        if coefficients.kd != 0.0:
            state_TD, packed = hidden_TD.detach(), PackedSequences(batch.sequence_ids, batch.rows, batch.seed)
            student = partial(row_statistics, state_TD, weight_VD, bias_V, targets, spec, rows)
            targets = select(targets, self._training.selection, packed, student)
        return head_loss(hidden_TD, weight_VD, bias_V, targets, spec, rows)

    def _hidden_state_losses(self, states: States, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        feature = relation = batch.targets.weight_T.new_zeros(())
        for layer, teacher_layer in self.layer_map.features.items():
            student_TD, projection_ED = states[layer][batch.row_T], self.projections.weight_ED(layer)
            teacher_TE, rms_E = self._teacher_hidden(teacher_layer, batch)
            feature = feature + feature_loss(
                student_TD, teacher_TE, projection_ED, rms_E, batch.targets.weight_T, self._training.feature.loss
            )
        for layer, teacher_layer in self.layer_map.relations.items():
            teacher_TE, rms_E = self._teacher_hidden(teacher_layer, batch)
            relation = relation + relation_loss(
                states[layer][batch.row_T],
                teacher_TE,
                rms_E,
                batch.targets.weight_T,
                batch.rows,
                self._training.relation,
            )
        return feature, relation

    def _teacher_hidden(self, layer: int, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(hidden_TE, rms_E) of a captured layer."""
        index = self.layer_map.captured.index(layer)
        assert batch.hidden_TLE is not None
        assert self.layer_map.rms_LE is not None
        return batch.hidden_TLE[:, index], self.layer_map.rms_LE[index].to(batch.device)


def _make_projections(student_width: int, layer_map: LayerMap) -> Projections:
    """One projection per feature pair, orthogonal; the identity between equal widths, which suits copied layers."""
    teacher_width = student_width if layer_map.rms_LE is None else layer_map.rms_LE.shape[1]
    projections = Projections(layer_map.features, student_width, teacher_width)
    for layer in layer_map.features:
        nn.init.orthogonal_(projections.weight_ED(layer))
        if teacher_width == student_width:
            nn.init.eye_(projections.weight_ED(layer))
    return projections
