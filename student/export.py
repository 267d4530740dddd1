"""The export job: `python -m student.export JOB.json` writes every student as a model folder.

`AutoModelForCausalLM.from_pretrained` and vLLM load it: weights in the teacher's dtype, config, generation config,
tokenizer, model card, and `provenance.json`, which is written last.
"""

import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.cache.reader import CacheReader
from pipeline.cache.storage.layout import TOKENIZER
from pipeline.cache.storage.store import Store
from pipeline.config import Recipe, recipe_from_job_dict
from pipeline.errors import UsageError
from pipeline.identity import sha256_bytes
from pipeline.models.dtype import resolve_dtype
from pipeline.models.shipped import SHIPPED
from pipeline.run.job_process import run_job
from pipeline.run.outputs import EXPORT, PROVENANCE_JSON, REPORT_JSON, TRAIN_JSON
from pipeline.run.progress import counted, heartbeat
from student.release.card import model_card
from student.release.final import SHARD_SIZE, load_final
from student.training_job import TrainingJob, package_versions

logger = logging.getLogger(__name__)


def export(recipe: Recipe) -> None:
    """Write `export/<student>/` for every student of the recipe. Raises StillhouseError."""
    for spec in recipe.all_students:
        job = TrainingJob(recipe, spec.name)
        store = Store.open(recipe.storage).child(f"{EXPORT}/{spec.name}")
        export_student(job, store)
        logger.info("%s: exported to %s", spec.name, store.uri)


def export_student(job: TrainingJob, store: Store) -> None:
    """Write one student's folder. Raises UsageError if it is not trained."""
    data = job.store.read_if_present(TRAIN_JSON)
    if data is None:
        raise UsageError(f"{job.title} ({job.store.uri}): not trained yet; run: stillhouse train {job.recipe.name}")
    with heartbeat(f"{job.title}: exporting"):
        files = _model_files(job)
    cache = job.caches()[0].store
    files |= {Path(path).name: cache.read(path) for path in cache.list(TOKENIZER)}
    provenance = make_provenance(job, json.loads(data), files)
    files["README.md"] = model_card(provenance).encode()
    write_folder(store, files, provenance, title=f"{job.title}: exporting")


def write_folder(store: Store, files: dict[str, bytes], provenance: dict[str, Any], title: str) -> None:
    """Replace the folder's contents; it is complete once `provenance.json` exists."""
    store.delete(PROVENANCE_JSON)
    for stale in set(store.list()) - set(files):
        store.delete(stale)
    for name, content in counted(files.items(), title, "file", len(files)):
        store.put(name, content)
    store.put(PROVENANCE_JSON, json.dumps(provenance, indent=2).encode())


def make_provenance(job: TrainingJob, training: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    """Contents of `provenance.json`: recipe, teachers and caches, training, results, sha256 of every file."""
    report = Store.open(job.recipe.storage).read_if_present(REPORT_JSON)
    students = {} if report is None else json.loads(report)["students"]
    return {
        "student": job.student,
        "recipe": job.recipe.to_dict(),
        "teachers": [_teacher_summary(job.recipe, cache) for cache in job.caches()],
        "training": training,
        "results": students.get(job.student, {}).get("results"),
        "files": {name: sha256_bytes(content) for name, content in sorted(files.items())},
        "versions": package_versions(),
    }


def _model_files(job: TrainingJob) -> dict[str, bytes]:
    """Weights, config and generation config as `save_pretrained` writes them, by file name."""
    teacher = job.recipe.teacher_by_name(job.spec.from_teacher or job.recipe.training_teachers[0].name)
    model = load_final(job.store).to(getattr(torch, resolve_dtype(teacher, job.recipe).dtype))
    with tempfile.TemporaryDirectory(prefix="stillhouse-export-") as folder:
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def _teacher_summary(recipe: Recipe, cache: CacheReader) -> dict[str, Any]:
    spec = recipe.teacher_by_name(cache.description.name)
    shipped = SHIPPED.get(spec.model)
    return {
        "name": spec.name,
        "model": Path(spec.model).name if Path(spec.model).is_dir() else spec.model,
        "revision": spec.revision,
        "licence": None if shipped is None else shipped.licence,
        "engine": f"{cache.description.engine} {cache.description.engine_version}",
        "architecture": cache.description.architecture,
        "cache": cache.manifest.fingerprint,
        "tokens": cache.manifest.tokens,
    }


def main(arguments: Sequence[str]) -> int:
    """Run the job of a job file and return the exit code."""
    return run_job(lambda job: export(recipe_from_job_dict(job)), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
