"""The recipe: the complete configuration of a run, checked across its sections."""

import re
from dataclasses import asdict
from typing import Any, Self

from pydantic import Field, PrivateAttr, model_validator

from pipeline.config.base import Name, Section
from pipeline.config.capture import CaptureSettings, CorpusSpec, TeacherSpec
from pipeline.config.source_locations import SourceLocations, key_path
from pipeline.config.training import EvaluationSpec, StudentSpec, TrainingSpec, layers_after_gaps


class ClusterSpec(Section):
    """The Ray cluster that the jobs use."""

    address: str = "local"
    """`local` starts one on this machine; `auto` or an address connects to a running one, as in `ray.init`."""
    cpus: int | None = Field(default=None, ge=1)
    """`local` only: CPUs for Ray. Unset: all."""


class Recipe(Section):
    """One YAML file that describes a run: which teachers, which signals, which students, and how they are trained."""

    name: Name
    storage: str = Field(min_length=1)
    """Folder or fsspec URI for all files of the run."""
    seed: int = 0
    cluster: ClusterSpec = ClusterSpec()
    corpus: CorpusSpec
    teachers: tuple[TeacherSpec, ...] = Field(min_length=1)
    capture: CaptureSettings = CaptureSettings()
    student: StudentSpec | None = None
    students: tuple[StudentSpec, ...] = ()
    """Several students from the same caches; alternative to `student`."""
    training: TrainingSpec = TrainingSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    _locations: SourceLocations = PrivateAttr(default_factory=SourceLocations)

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
                    f"{teacher.pipeline_parallel} and its layers are in several processes, got {inner}"
                )
        for number, student in enumerate(self.all_students):
            if student.from_teacher is not None and student.from_teacher not in teachers:
                key = "student" if self.student is not None else f"students[{number}]"
                raise ValueError(f"{key}.from_teacher: expected one of {teachers}, got {student.from_teacher!r}")
        self._check_teacher_names(teachers)
        if self.training.feature.layer_gap_least_squares:
            self._check_layer_gaps()
        return self

    def _check_layer_gaps(self) -> None:
        """Find states that the training would lack. A mere number of layers cannot be checked without the teacher."""
        first, captured = self.training_teachers[0].name, self.capture.hidden_layers
        for student in self.all_students:
            if student.from_teacher != first:
                raise ValueError(
                    "training.feature.layer_gap_least_squares: expected students made of the first teacher's layers "
                    f"(from_teacher: {first}), got {student.name} with {student.from_teacher}"
                )
            exact = student.layers if isinstance(student.layers, tuple) else ()
            missing = sorted(set(layers_after_gaps(exact).values()) - set(captured))
            if missing:
                raise ValueError(
                    f"capture.hidden_layers: expected the states {missing} that "
                    f"training.feature.layer_gap_least_squares needs, got {[*captured]}"
                )

    def _check_teacher_names(self, teachers: list[str]) -> None:
        """Raise ValueError for names in the training's settings that no teacher has."""
        training = self.training
        reference = training.selection.sequences.reference if training.selection.sequences else None
        if reference is not None and (reference not in teachers or len(teachers) == 1):
            raise ValueError(
                "training.selection.sequences.reference: expected one of several teachers, "
                f"got {reference!r} of {teachers}"
            )
        known = [name for name in teachers if name != reference]
        names = {
            "weights": {key.rpartition(":")[2] for key in training.fusion.weights},
            "by_domain": set(training.fusion.by_domain.values()),
        }
        for key in names:
            if unknown := sorted(names[key] - set(known)):
                raise ValueError(f"training.fusion.{key}: expected names out of {known}, got {unknown[0]!r}")

    @property
    def all_students(self) -> tuple[StudentSpec, ...]:
        """All students of the run, from `student` or `students`."""
        return self.students if self.student is None else (self.student,)

    @property
    def training_teachers(self) -> tuple[TeacherSpec, ...]:
        """The teachers that the students learn from: all but the reference of difference sampling."""
        sequences = self.training.selection.sequences
        return tuple(t for t in self.teachers if sequences is None or t.name != sequences.reference)

    def teacher_by_name(self, name: str) -> TeacherSpec:
        """Return the teacher of that name. Raises KeyError."""
        return {teacher.name: teacher for teacher in self.teachers}[name]

    def authors(self, teacher: TeacherSpec) -> tuple[TeacherSpec, ...]:
        """Return the teachers whose answers `teacher` scores; empty if it scores the corpus itself."""
        candidates = self.teachers if self.capture.answers == "all" else (teacher,)
        return tuple(author for author in candidates if author.sampling is not None)

    def max_model_len(self, teacher: TeacherSpec) -> int:
        """Return the engine's maximum context in tokens: a sequence, or a prompt with its answer."""
        answer = 0 if teacher.sampling is None else teacher.sampling.max_tokens
        return self.corpus.sequence_length + answer

    def student_by_name(self, name: str) -> StudentSpec:
        """Return the student of that name. Raises KeyError."""
        return {student.name: student for student in self.all_students}[name]

    def cache_uri(self, teacher: str) -> str:
        """Return the folder or URI of a teacher's cache."""
        return f"{self.storage.rstrip('/')}/{self.cache_path(teacher)}"

    def student_uri(self, student: str, arm: str = "student") -> str:
        """Return the folder or URI of the training of a student, or of its control (`arm`)."""
        return f"{self.storage.rstrip('/')}/{self.student_path(student, arm)}"

    @staticmethod
    def cache_path(teacher: str) -> str:
        """Return the path of a teacher's cache in the storage."""
        return f"caches/{teacher}"

    @staticmethod
    def student_path(student: str, arm: str = "student") -> str:
        """Return the path of a student's training, or of its control's, in the storage."""
        return f"students/{student}{'' if arm == 'student' else '-' + arm}"

    def set_locations(self, locations: SourceLocations) -> Self:
        """Attach the file and line of every key, and return the recipe."""
        self._locations = locations
        return self

    def location(self, key: str) -> str:
        """Return where a key was set: `recipe quickstart.yaml:14 capture.k` or `override capture.k=0`."""
        return self._locations.location(key_path(key))

    def add_location(self, message: str) -> str:
        """Replace the key that a message begins with (`training.lora.targets: ...`), if any, by its location."""
        key = re.match(r"([a-z_]+)[\w.\[\]-]*(?=: )", message)
        if key is None or key[1] not in Recipe.model_fields:
            return message
        return self.location(key[0]) + message[key.end() :]

    def to_job_dict(self) -> dict[str, Any]:
        """Return the recipe and the locations of its keys as JSON values, for a job file."""
        return {"recipe": self.to_dict(), "origins": asdict(self._locations)}

    def to_dict(self) -> dict[str, Any]:
        """Return every key with its value, defaults included, as JSON values."""
        return self.model_dump(mode="json")
