"""The jobs of a run: which there are, which module each one runs, and what each one depends on."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.storage.layout import FAITHFULNESS_JSON
from pipeline.cache.storage.store import Store
from pipeline.config import Recipe
from pipeline.identity import canonical_json, fingerprint
from pipeline.run.outputs import EXPORT, PROVENANCE_JSON, REPORT_JSON, TRAIN_JSON

JOB_MODULES = {
    "capture": "actors.capture",
    "probe": "actors.probe",
    "train": "student.train",
    "evaluate": "student.evaluate",
    "export": "student.export",
}
"""The module that runs a job, by the job's kind: `python -m MODULE JOB.json`."""
STAGES = ("capture", "train", "evaluate", "export")
WITHOUT_EFFECT_ON_SIGNALS = {
    *("replicas", "placement", "tensor_parallel", "pipeline_parallel"),
    *("max_batched_tokens", "chunk_rows", "kv_cache_gib", "gpu_memory_share"),
}
"""Settings of a teacher that change where and how fast it runs, and none of its signals."""


@dataclass(frozen=True, slots=True)
class Job:
    """One process of a run."""

    stage: str
    """Its kind: a key of JOB_MODULES."""
    name: str
    """Such as `train-student-control`; names the job's record in the storage."""
    values: dict[str, Any]
    """Content of its job file."""
    key: str
    """Fingerprint of everything that its outcome depends on."""
    outputs: tuple[str, ...] = ()
    """Files in the run's storage that the job writes last."""

    def is_done(self, store: Store) -> bool:
        """Whether the job has succeeded before, under the same fingerprint, and its outputs still exist."""
        try:
            record = json.loads(store.read_if_present(f"jobs/{self.name}.json") or b"{}")
        except ValueError:
            return False
        return isinstance(record, dict) and record.get("key") == self.key and all(map(store.exists, self.outputs))

    def record(self, store: Store, seconds: float) -> None:
        """Note in the storage that the job has succeeded."""
        content = canonical_json({"key": self.key, "seconds": round(seconds, 1)})
        store.put(f"jobs/{self.name}.json", content.encode())


def jobs_of(recipe: Recipe) -> Iterator[Job]:
    """Yield every job of a run in its order."""
    capture = _capture_job(recipe)
    yield capture
    trainings = list(_training_jobs(recipe, capture.key))
    yield from trainings
    if trainings:
        settings = {"trainings": [job.key for job in trainings], "evaluation": recipe.to_dict()["evaluation"]}
        key = fingerprint(settings)
        exports = tuple(f"{EXPORT}/{student.name}/{PROVENANCE_JSON}" for student in recipe.all_students)
        yield Job("evaluate", "evaluate", recipe.to_job_dict(), key, (REPORT_JSON,))
        yield Job("export", "export", recipe.to_job_dict(), key, exports)


def _capture_job(recipe: Recipe) -> Job:
    """One job for all teachers: Ray runs them side by side where resources allow."""
    resolved = recipe.to_dict()
    teachers = [
        {key: teacher[key] for key in teacher.keys() - WITHOUT_EFFECT_ON_SIGNALS} for teacher in resolved["teachers"]
    ]
    depends = {name: resolved[name] for name in ("seed", "corpus", "capture")} | {"teachers": teachers}
    files = _file_states(recipe.corpus.source, *(teacher.model for teacher in recipe.teachers))
    verdicts = tuple(f"{recipe.cache_path(teacher.name)}/{FAITHFULNESS_JSON}" for teacher in recipe.teachers)
    key = fingerprint(depends | {"state": files})
    return Job("capture", "capture", {**recipe.to_job_dict(), "teacher": None}, key, verdicts)


def _training_jobs(recipe: Recipe, capture_key: str) -> Iterator[Job]:
    training = recipe.to_dict()["training"]
    for student in recipe.all_students:
        for arm in ("student", "control") if recipe.evaluation.control == "ce" else ("student",):
            depends = {"capture": capture_key, "seed": recipe.seed, "arm": arm}
            key = fingerprint(depends | {"student": student.model_dump_json(), "training": training})
            name = student.name if arm == "student" else f"{student.name}-{arm}"
            values = {**recipe.to_job_dict(), "student": student.name, "arm": arm}
            record = f"{recipe.student_path(student.name, arm)}/{TRAIN_JSON}"
            yield Job("train", f"train-{name}", values, key, (record,))


def _file_states(*sources: str) -> list[str]:
    """Names, sizes and modification times of local files: a changed text or model changes the key."""
    paths = [Path(source) for source in sources]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    states = [(file, file.stat()) for file in files if file.is_file()]
    return [f"{file}:{state.st_size}:{state.st_mtime_ns}" for file, state in states]
