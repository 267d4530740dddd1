"""What a run will take, before anything starts: tokens, bytes by column, memory, hours, and when the cache pays off.

From the recipe, the corpus and the models' configs alone; nothing is written. What cannot fit is refused with the
reason: memory of this machine and its Ray, room on the disk, one sequence's keys and values.
"""

import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.cache.schema import ShardSpec
from pipeline.cache.storage import Store
from pipeline.config import Recipe, TeacherSpec
from pipeline.contracts import Split
from pipeline.corpus import Splitter, read_documents
from pipeline.errors import RecipeError
from pipeline.estimate import Memory, column_bytes, kv_bytes_per_token, teacher_memory
from pipeline.model_store import ModelFolder, resolve_model
from pipeline.prepare import check_capture
from pipeline.sequences import CutSettings, Cutter, units_of
from pipeline.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

CAPTURE_PACE = 0.75
"""Tokens a second of a capture, as a share of bare prefill: the goal that `make bench-capture` measures."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What the corpus comes to under one tokenizer."""

    units: int
    sequences: int
    tokens: dict[Split, int]
    audited_tokens: int

    @property
    def total_tokens(self) -> int:
        """Of both splits."""
        return sum(self.tokens.values())


@dataclass(frozen=True, slots=True)
class TeacherPlan:
    """What one teacher's cache will take."""

    name: str
    counts: Counts
    column_bytes: dict[str, int]
    """Stored bytes of each column, over the whole cache."""
    memory: Memory
    """Of one replica."""
    replicas: int
    hours: float | None
    """With all replicas at work; None where no pace is given."""
    pays_off_after_runs: int
    """Student runs from which on the cache has cost less teacher time than a teacher in the training loop."""

    @property
    def stored_bytes(self) -> int:
        """Of all shards."""
        return sum(self.column_bytes.values())

    def __str__(self) -> str:
        counts, memory = self.counts, self.memory
        largest = sorted(self.column_bytes.items(), key=lambda item: -item[1])[:8]
        return "\n".join(
            (
                f"teacher {self.name}",
                f"  tokens    {counts.tokens['train']:,} training, {counts.tokens['held_out']:,} held out, in "
                f"{counts.sequences:,} sequences and {counts.units:,} units",
                f"  storage   {_bytes(self.stored_bytes)}, {self.stored_bytes / max(counts.total_tokens, 1):,.0f} "
                f"bytes/token: {', '.join(f'{name} {_bytes(size)}' for name, size in largest)}",
                f"  memory    {_bytes(memory.total_bytes)} a replica, {self.replicas} at most: "
                f"weights {_bytes(memory.weights_bytes)}, keys and values {_bytes(memory.kv_cache_bytes)}, "
                f"a chunk of logits {_bytes(memory.chunk_bytes)}, signals {_bytes(memory.signals_bytes)}, "
                f"runtime {_bytes(memory.runtime_bytes)}",
                f"  time      {'unknown: give --tokens-per-s' if self.hours is None else _hours(self.hours)}",
                f"  pays off  after {self.pays_off_after_runs} student run(s), against a teacher in the training loop",
            )
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run's teachers will take."""

    name: str
    storage: str
    teachers: tuple[TeacherPlan, ...]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        teachers = [
            {
                **asdict(teacher),
                "tokens": teacher.counts.total_tokens,
                "units": teacher.counts.units,
                "stored_bytes": teacher.stored_bytes,
                "memory_bytes": teacher.memory.total_bytes,
            }
            for teacher in self.teachers
        ]
        return {"name": self.name, "storage": self.storage, "teachers": teachers}

    def __str__(self) -> str:
        """For people."""
        return "\n".join((f"plan {self.name}, storage {self.storage}", *(str(teacher) for teacher in self.teachers)))


def plan(recipe: Recipe, tokens_per_s: float | None = None) -> Plan:
    """What the recipe's captures take. `tokens_per_s` is one replica's pace.

    Raises RecipeError where it cannot fit, and what preparing the caches would raise: CorpusError, ModelError.
    """
    teachers = tuple(_plan_teacher(recipe, teacher, tokens_per_s) for teacher in recipe.teachers)
    _check_disk(recipe, sum(teacher.stored_bytes for teacher in teachers))
    return Plan(recipe.name, recipe.storage, teachers)


def _plan_teacher(recipe: Recipe, teacher: TeacherSpec, tokens_per_s: float | None) -> TeacherPlan:
    model = None if teacher.engine == "dummy" and teacher.model == "dummy" else _model(teacher)
    check_capture(recipe, teacher, model)
    spec = _shard_spec(recipe, teacher, model)
    counts = _count(recipe, model)
    unit_tokens = recipe.capture.unit_sequences * recipe.corpus.sequence_length
    memory = teacher_memory(teacher, spec, None if model is None else model.path, unit_tokens)
    _check_memory(recipe, teacher, model, memory)
    replicas = min(teacher.replica_range[1], max(counts.units, 1))
    return TeacherPlan(
        name=teacher.name,
        counts=counts,
        column_bytes=_stored(recipe, spec, counts),
        memory=memory,
        replicas=replicas,
        hours=None if tokens_per_s is None else counts.total_tokens / tokens_per_s / replicas / 3600,
        pays_off_after_runs=pays_off_after(counts, recipe.training.epochs),
    )


def pays_off_after(counts: Counts, epochs: float) -> int:
    """The number of student runs from which on capturing once is cheaper than prefilling in every run.

    A run with a live teacher prefills the training tokens once an epoch, and the held-out ones once.
    """
    live_tokens = epochs * counts.tokens["train"] + counts.tokens["held_out"]
    return max(1, math.ceil(counts.total_tokens / CAPTURE_PACE / max(live_tokens, 1.0)))


def _model(teacher: TeacherSpec) -> ModelFolder:
    return resolve_model(teacher.model, revision=teacher.revision)


def _shard_spec(recipe: Recipe, teacher: TeacherSpec, model: ModelFolder | None) -> ShardSpec:
    sizes = {} if model is None else model.text_config
    options = teacher.options
    return ShardSpec(
        capture=recipe.capture.spec(recipe.seed),
        vocabulary=int(options.get("vocabulary", sizes.get("vocab_size", 512))),
        hidden_width=int(options.get("width", sizes.get("hidden_size", 32))),
        layers=int(options.get("layers", sizes.get("num_hidden_layers", 4))),
    )


def _count(recipe: Recipe, model: ModelFolder | None) -> Counts:
    tokenizer: Tokenizer = ByteTokenizer() if model is None else load_tokenizer(model.path)
    settings = CutSettings(recipe.corpus, recipe.capture.audit, recipe.seed)
    side = Splitter((d.id for d in read_documents(recipe.corpus)), recipe.corpus.held_out, recipe.seed)
    sequences = Cutter(tokenizer, settings, side).sequences(read_documents(recipe.corpus))
    units = rows = audited = 0
    tokens: dict[Split, int] = {"train": 0, "held_out": 0}
    for unit in units_of(sequences, recipe.capture.unit_sequences):
        units, rows = units + 1, rows + len(unit.sequences)
        lengths = [len(sequence.input_ids_N) for sequence in unit.sequences]
        tokens[unit.split] += sum(lengths)
        audited += sum(n for n, sequence in zip(lengths, unit.sequences, strict=True) if sequence.audited)
    return Counts(units, rows, tokens, audited)


def _stored(recipe: Recipe, spec: ShardSpec, counts: Counts) -> dict[str, int]:
    average = max(2, round(counts.total_tokens / max(counts.sequences, 1)))
    per_token = column_bytes(spec, average)
    audited_share = counts.audited_tokens / max(counts.total_tokens, 1)
    per_token["exact_hidden"] *= audited_share
    return {name: round(size * counts.total_tokens) for name, size in per_token.items()}


def _check_memory(recipe: Recipe, teacher: TeacherSpec, model: ModelFolder | None, memory: Memory) -> None:
    for problem in _memory_problems(recipe, teacher, model, memory):
        raise RecipeError(f"recipe {recipe.name} teacher {teacher.name}: {problem}")


def _memory_problems(recipe: Recipe, teacher: TeacherSpec, model: ModelFolder | None, memory: Memory) -> Iterator[str]:
    if model is not None:
        needed = kv_bytes_per_token(model.text_config, teacher.dtype) * recipe.corpus.sequence_length
        if needed > memory.kv_cache_bytes and not teacher.placement.gpus:
            yield (
                f"kv_cache_gib: keys and values of one sequence take {needed / 2**30:.2f} GiB, "
                f"expected at least that much, got {teacher.kv_cache_gib:g}"
            )
    total = psutil.virtual_memory().total
    if recipe.cluster.address == "local" and not teacher.placement.gpus and memory.total_bytes > total:
        yield f"a replica takes {_bytes(memory.total_bytes)} of memory, expected at most {_bytes(total)}, all there is"


def _check_disk(recipe: Recipe, stored_bytes: int) -> None:
    folder: Path | None = Store.open(recipe.storage).local_path()
    if folder is None:
        return
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if stored_bytes > free:
        raise RecipeError(
            f"recipe {recipe.name} storage {folder}: the caches take {_bytes(stored_bytes)}, "
            f"expected at most {_bytes(free)}, all that is free there"
        )


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
