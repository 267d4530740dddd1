"""Progress of a run, read from its storage alone."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.cache.manifest import derive_manifest, read_manifest
from pipeline.cache.storage.layout import UNIT_INDEX
from pipeline.cache.storage.store import Store
from pipeline.cache.unit_list import UnitList
from pipeline.config import Recipe
from pipeline.errors import ExitCode
from pipeline.run.outputs import REPORT_JSON, TRAIN_JSON


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """State of one teacher's cache."""

    teacher: str
    units: int
    committed: int
    tokens: int
    """Tokens of the committed units."""
    bytes: int
    quarantined: int
    finished: bool
    """Every unit is committed, and the manifest lists them."""

    def __str__(self) -> str:
        """One line of the report."""
        if self.units == 0:
            return f"cache {self.teacher}: not started"
        each = self.bytes / self.tokens if self.tokens else 0.0
        state = "finished" if self.finished else "unfinished"
        return (
            f"cache {self.teacher}: {state}, {self.committed} of {self.units} units, {self.tokens:,} tokens, "
            f"{self.bytes:,} bytes ({each:.0f} a token), {self.quarantined} quarantined"
        )


@dataclass(frozen=True, slots=True)
class StudentStatus:
    """State of one training: a student's or its control's."""

    name: str
    step: int
    """Step of the last line of its log."""
    steps: int
    finished: bool

    def __str__(self) -> str:
        """One line of the report."""
        if self.steps == 0:
            return f"training {self.name}: not started"
        state = "finished" if self.finished else "unfinished"
        return f"training {self.name}: {state}, step {self.step} of {self.steps}"


@dataclass(frozen=True, slots=True)
class Status:
    """State of a run."""

    name: str
    storage: str
    caches: tuple[CacheStatus, ...]
    students: tuple[StudentStatus, ...]
    results: dict[str, Any] | None
    """Results in `report.json`, None before the evaluation."""

    @property
    def complete(self) -> bool:
        """Whether every cache and training is finished and the report exists."""
        parts: tuple[CacheStatus | StudentStatus, ...] = (*self.caches, *self.students)
        return all(part.finished for part in parts) and self.results is not None

    @property
    def exit_code(self) -> ExitCode:
        """INCOMPLETE until the run is complete."""
        return ExitCode.DONE if self.complete else ExitCode.INCOMPLETE

    def as_json(self) -> dict[str, Any]:
        """Values for `--json`."""
        return asdict(self) | {"complete": self.complete}

    def __str__(self) -> str:
        """Text for the terminal."""
        lines = [f"run {self.name} in {self.storage}: {'complete' if self.complete else 'incomplete'}"]
        lines += [f"  {part}" for part in (*self.caches, *self.students)]
        lines.append(f"  report: {'none yet' if self.results is None else self.storage + '/report.json'}")
        return "\n".join(lines)


def status(recipe: Recipe) -> Status:
    """Read the state of the recipe's run. Raises StorageError, and DamageError where a record is damaged."""
    store = Store.open(recipe.storage)
    arms = ("student", "control") if recipe.evaluation.control == "ce" else ("student",)
    report = store.read_if_present(REPORT_JSON)
    return Status(
        name=recipe.name,
        storage=recipe.storage,
        caches=tuple(_cache(recipe, teacher.name) for teacher in recipe.teachers),
        students=tuple(_student(recipe, student.name, arm) for student in recipe.all_students for arm in arms),
        results=None if report is None else json.loads(report)["results"],
    )


def _cache(recipe: Recipe, teacher: str) -> CacheStatus:
    store = Store.open(recipe.cache_uri(teacher))
    if not store.exists(UNIT_INDEX):
        return CacheStatus(teacher, 0, 0, 0, 0, 0, finished=False)
    units = UnitList.open(store)
    now = derive_manifest(store)
    stored = read_manifest(store)
    whole = len(now.commits) == len(units) and stored is not None and stored.commits == now.commits
    return CacheStatus(teacher, len(units), len(now.commits), now.tokens, now.bytes, len(now.quarantined), whole)


def _student(recipe: Recipe, student: str, arm: str) -> StudentStatus:
    uri = recipe.student_uri(student, arm)
    store = Store.open(uri)
    log = (store.read_if_present("log.jsonl") or b"").decode().splitlines()
    last = json.loads(log[-1]) if log else {}
    name = uri.rsplit("/", 1)[-1]
    return StudentStatus(name, last.get("step", 0), last.get("steps", 0), store.exists(TRAIN_JSON))
