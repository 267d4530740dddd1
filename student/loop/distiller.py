"""One forward pass of distillation: a packed micro-batch in, the sums of its losses out.

A module of its own, so that what wraps it (DDP, FSDP2) sees every use of every weight in one forward: the layers, the
LM head inside the chunked loss, and the projections, which are learned but stay outside the student.
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
"""The losses, in the order of the vector that a forward pass gives."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """How much each loss counts in one step. As it stands: a control, which learns from the labels alone."""

    kd: float = 0.0
    ce: float = 1.0
    feature: float = 0.0
    relation: float = 0.0
    step: int = 0
    steps: int = 1
    """Where in the run: the weights within the output loss may move too."""


def coefficients_at(training: TrainingSpec, step: int, steps: int) -> Coefficients:
    """The coefficients of step `step` of `steps` in the student's arm."""
    parts = {part: coefficient_at(getattr(training.losses, part), step, steps) for part in PARTS}
    return Coefficients(**parts, step=step, steps=steps)


@dataclass(frozen=True, slots=True)
class LayerMap:
    """Which student layers are held against which of the captured ones, and how large the captured ones are.

    Layers are numbered as in pipeline/contracts.py; the maps lead from the student's to the teacher's.
    """

    captured: tuple[int, ...] = ()
    """Teacher layers in the order of `hidden_TLD`."""
    features: Mapping[int, int] = field(default_factory=dict)
    relations: Mapping[int, int] = field(default_factory=dict)
    rms_LE: Tensor | None = None
    """Root mean square of each captured layer's channels."""

    @property
    def layers(self) -> list[int]:
        """The student's layers whose states are needed."""
        return sorted({*self.features, *self.relations})


class Distiller(nn.Module):
    """The student, its projections, and the losses that they are trained on."""

    def __init__(self, student: Student, training: TrainingSpec, matching: LayerMap, head: HeadSpec) -> None:
        super().__init__()
        self.student = student
        self.projections = _projections(student.width, matching)
        self.matching = matching
        self._training, self._head = training, head

    def forward(self, batch: MicroBatch, coefficients: Coefficients) -> tuple[Tensor, Tensor]:
        """(total, parts_P): the weighted sum with gradient, and the bare sums of PARTS without."""
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self._training.dtype == "bfloat16"):
            last_ND, states = self.student.states(batch.input_ids_N, batch.position_ids_N, self.matching.layers)
        head = self._output_loss(last_ND[batch.row_T], batch, coefficients)
        feature, relation = self._state_losses(states, batch)
        balanced = feature * self.projections.balance.to(feature.dtype) if self._training.feature.balance else feature
        total = head.total + coefficients.relation * relation + coefficients.feature * balanced
        return total, torch.stack([head.parts["kd"], head.parts["ce"], feature.detach(), relation.detach()])

    def rebalance(self, parts: Mapping[str, float], coefficients: Coefficients) -> None:
        """Remember for the next step how large the output loss is beside the feature loss.

        `parts`: the whole step's means. Within a step the factor has to stand still: one a micro-batch would make the
        gradient depend on how the step is packed.
        """
        kd = coefficients.kd * self._training.distribution.temperature**2
        output, feature = kd * parts["kd"] + coefficients.ce * parts["ce"], parts["feature"]
        if output > 0.0 and feature > 0.0:
            self.projections.balance.fill_(output / feature)

    def _output_loss(self, hidden_TD: Tensor, batch: MicroBatch, coefficients: Coefficients) -> HeadLoss:
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

    def _state_losses(self, states: States, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        feature = relation = batch.targets.weight_T.new_zeros(())
        for layer, teacher_layer in self.matching.features.items():
            map_ED = self.projections.weight_ED(layer)
            pair = states[layer][batch.row_T], *self._teacher(teacher_layer, batch)
            feature = feature + feature_loss(
                pair[0], pair[1], map_ED, pair[2], batch.targets.weight_T, self._training.feature.loss
            )
        for layer, teacher_layer in self.matching.relations.items():
            teacher_TE, rms_E = self._teacher(teacher_layer, batch)
            relation = relation + relation_loss(
                states[layer][batch.row_T],
                teacher_TE,
                rms_E,
                batch.targets.weight_T,
                batch.rows,
                self._training.relation,
            )
        return feature, relation

    def _teacher(self, layer: int, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        slot = self.matching.captured.index(layer)
        assert batch.hidden_TLE is not None
        assert self.matching.rms_LE is not None
        return batch.hidden_TLE[:, slot], self.matching.rms_LE[slot].to(batch.device)


def _projections(student_width: int, matching: LayerMap) -> Projections:
    """One map a feature pair. Between equal widths it starts as the identity: an inherited layer needs no turning."""
    teacher_width = student_width if matching.rms_LE is None else matching.rms_LE.shape[1]
    projections = Projections(matching.features, student_width, teacher_width)
    for layer in matching.features:
        nn.init.orthogonal_(projections.weight_ED(layer))
        if teacher_width == student_width:
            nn.init.eye_(projections.weight_ED(layer))
    return projections
