"""The recipe: everything that a run is, as one value."""

import json
import re
from typing import Any, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from pipeline.config.base import Name, Section
from pipeline.config.capture import CaptureSettings, CorpusSpec, TeacherSpec
from pipeline.config.source_locations import SourceLocations, key_path
from pipeline.config.training import EvaluationSpec, StudentSpec, TrainingSpec, layers_after_gaps


class ClusterSpec(Section):
    """Which Ray cluster the jobs use."""

    address: str = "local"
    """`local` starts one on this machine; `auto`, or an address, joins one."""
    cpus: int | None = Field(default=None, ge=1)
    """`local` only: CPUs that Ray may use. Unset: all."""


class Recipe(Section):
    """One YAML file that describes a whole run."""

    name: Name
    storage: str = Field(min_length=1)
    """Folder or fsspec URI under which everything of the run is kept."""
    seed: int = 0
    cluster: ClusterSpec = ClusterSpec()
    corpus: CorpusSpec
    teachers: tuple[TeacherSpec, ...] = Field(min_length=1)
    capture: CaptureSettings = CaptureSettings()
    student: StudentSpec | None = None
    students: tuple[StudentSpec, ...] = ()
    """Several students from the same caches; or one, as `student`."""
    training: TrainingSpec = TrainingSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    _locations: SourceLocations = PrivateAttr(default_factory=SourceLocations)

    @field_validator("teachers", "students", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if self.student is not None and self.students:
            raise ValueError("students: expected student or students, got both")
        teachers = [teacher.name for teacher in self.teachers]
        for kind, names in (("teachers", teachers), ("students", [s.name for s in self.all_students])):
            if len(set(names)) != len(names):
                raise ValueError(f"{kind}: expected every name once, got {names}")
        if self.capture.answers == "all" and all(teacher.sampling is None for teacher in self.teachers):
            raise ValueError("capture.answers: expected a teacher with sampling, since `all` answers are scored")
        for teacher in self.teachers:
            inner = [layer for layer in self.capture.hidden_layers if layer >= 0]
            if inner and teacher.engine == "vllm" and teacher.pipeline_parallel > 1:
                raise ValueError(
                    f"capture.hidden_layers: expected -1 alone, since teacher {teacher.name} has pipeline_parallel "
                    f"{teacher.pipeline_parallel} and its layers lie in several processes, got {inner}"
                )
        for number, student in enumerate(self.all_students):
            if student.from_teacher is not None and student.from_teacher not in teachers:
                key = "student" if self.student is not None else f"students[{number}]"
                raise ValueError(f"{key}.from_teacher: expected one of {teachers}, got {student.from_teacher!r}")
        self._check_sources(teachers)
        if self.training.feature.layer_gap_least_squares:
            self._check_layer_gaps()
        return self

    def _check_layer_gaps(self) -> None:
        """Refuse before the capture what the training would miss. A mere number of layers says too little for that."""
        first, captured = self.training_teachers[0].name, self.capture.hidden_layers
        for student in self.all_students:
            if student.from_teacher != first:
                raise ValueError(
                    f"training.feature.layer_gap_least_squares: expected students made of the first teacher's layers (from_teacher: "
                    f"{first}), got {student.name} with {student.from_teacher}"
                )
            exact = student.layers if isinstance(student.layers, tuple) else ()
            missing = sorted(set(layers_after_gaps(exact).values()) - set(captured))
            if missing:
                raise ValueError(
                    f"capture.hidden_layers: expected the states {missing} that training.feature.layer_gap_least_squares needs, "
                    f"got {[*captured]}"
                )

    def _check_sources(self, teachers: list[str]) -> None:
        """Refuse names in the training's settings that no teacher has."""
        training = self.training
        reference = training.selection.sequences.reference if training.selection.sequences else None
        if reference is not None and (reference not in teachers or len(teachers) == 1):
            raise ValueError(
                "training.selection.sequences.reference: expected one of several teachers, "
                f"got {reference!r} of {teachers}"
            )
        teaching = [name for name in teachers if name != reference]
        named = {"weights": [key.rpartition(":")[2] for key in training.fusion.weights]}
        named["by_domain"] = list(training.fusion.by_domain.values())
        for key, names in named.items():
            unknown = sorted(set(names) - set(teaching))
            if unknown:
                raise ValueError(f"training.fusion.{key}: expected names out of {teaching}, got {unknown[0]!r}")

    @property
    def all_students(self) -> tuple[StudentSpec, ...]:
        """Every student of the run, however the recipe names them."""
        return self.students if self.student is None else (self.student,)

    @property
    def training_teachers(self) -> tuple[TeacherSpec, ...]:
        """The teachers that the student learns from: all but the reference of difference sampling."""
        sequences = self.training.selection.sequences
        return tuple(t for t in self.teachers if sequences is None or t.name != sequences.reference)

    def teacher_by_name(self, name: str) -> TeacherSpec:
        """The teacher of that name. Raises KeyError."""
        return {teacher.name: teacher for teacher in self.teachers}[name]

    def authors(self, teacher: TeacherSpec) -> tuple[TeacherSpec, ...]:
        """Those whose answers to the corpus' prompts the teacher scores; none where it reads the corpus as it is."""
        asked = self.teachers if self.capture.answers == "all" else (teacher,)
        return tuple(author for author in asked if author.sampling is not None)

    def max_model_len(self, teacher: TeacherSpec) -> int:
        """Tokens of the longest text that the teacher has before it: a sequence, or a prompt and its answer."""
        written = 0 if teacher.sampling is None else teacher.sampling.max_tokens
        return self.corpus.sequence_length + written

    def student_by_name(self, name: str) -> StudentSpec:
        """The student of that name. Raises KeyError."""
        return {student.name: student for student in self.all_students}[name]

    def cache_uri(self, teacher: str) -> str:
        """Where that teacher's cache lies."""
        return f"{self.storage.rstrip('/')}/{self.cache_path(teacher)}"

    def student_uri(self, student: str, arm: str = "student") -> str:
        """Where that student's training (or its control's) lies."""
        return f"{self.storage.rstrip('/')}/{self.student_path(student, arm)}"

    @staticmethod
    def cache_path(teacher: str) -> str:
        """That teacher's cache, below the storage."""
        return f"caches/{teacher}"

    @staticmethod
    def student_path(student: str, arm: str = "student") -> str:
        """That student's training (or its control's), below the storage."""
        return f"students/{student}{'' if arm == 'student' else '-' + arm}"

    def set_locations(self, origins: SourceLocations) -> Self:
        """The recipe, knowing from now on where its keys were written."""
        self._locations = origins
        return self

    def location(self, key: str) -> str:
        """Who is to blame for a key's value: `recipe quickstart.yaml:14 capture.k`, or `override capture.k=0`."""
        return self._locations.location(key_path(key))

    def add_location(self, message: str) -> str:
        """A message that begins with a key (`training.lora.targets: ...`), with the key's place instead."""
        found = re.match(r"([a-z_]+)[\w.\[\]-]*(?=: )", message)
        if found is None or found[1] not in Recipe.model_fields:
            return message
        return self.location(found[0]) + message[found.end() :]

    def to_job_dict(self) -> dict[str, Any]:
        """What a job's file holds of the recipe."""
        return {"recipe": self.to_dict(), "origins": self._locations.as_json()}

    def to_dict(self) -> dict[str, Any]:
        """Every key with its value, defaults included, as JSON can hold it."""
        resolved: dict[str, Any] = json.loads(self.model_dump_json())
        return resolved
