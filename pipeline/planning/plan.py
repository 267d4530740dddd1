"""The plan of a run: tokens, stored bytes by column, memory, hours, and when the cache pays off.

Computed from the recipe, the corpus and the models' configs, and on request from a short probe; writes nothing.
Refuses what does not fit: CPUs, GPUs and memory of this machine, free disk space, the KV cache of one sequence. The
resources of a remote cluster are not known here.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.format.schema import ShardSpec
from pipeline.cache.storage.store import Store
from pipeline.config import Recipe, TeacherSpec
from pipeline.corpus.prepare import check_capture, resolve_teacher_model
from pipeline.errors import RecipeError
from pipeline.models.dtype import resolve_dtype
from pipeline.models.folders import ModelFolder
from pipeline.planning.estimate import Memory, column_bytes, gpu_bytes_per_rank, kv_bytes_per_token, teacher_memory
from pipeline.planning.resources import Machine, Placement, check_fits, concurrent_replicas, placement_for
from pipeline.planning.token_counts import Counts, count
from pipeline.run.launch import measure_throughput


@dataclass(frozen=True, slots=True)
class TeacherPlan:
    """The plan of one teacher's cache."""

    name: str
    counts: Counts
    column_bytes: dict[str, int]
    """Stored bytes of the whole cache, by column."""
    at_most: bool
    """Whether the counts are upper bounds: answers are not generated yet."""
    memory: Memory
    """Host memory of one replica."""
    gpu_bytes_per_rank: int
    """0 without a GPU."""
    replicas: int
    at_a_time: int
    """Replicas that run at the same time, beside those of the other teachers."""
    tokens_per_s: float | None
    """Throughput of one replica, as given or measured."""
    hours: float | None
    """Hours of scoring with that many replicas; None where the throughput is unknown."""
    pays_off_after_runs: int
    """Student runs after which the cache has cost less teacher time than a teacher in the training loop."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(self.column_bytes.values())

    def __str__(self) -> str:
        counts = self.counts
        largest = sorted(self.column_bytes.items(), key=lambda item: -item[1])[:8]
        bound = ", at most: answers count at their maximum length" if self.at_most else ""
        return "\n".join(
            (
                f"teacher {self.name}",
                f"  tokens    {counts.tokens['train']:,} training, {counts.tokens['held_out']:,} held out, in "
                f"{counts.sequences:,} sequences and {counts.units:,} units{bound}",
                f"  storage   {_bytes(self.stored_bytes)}, {self.stored_bytes / max(counts.total_tokens, 1):,.0f} "
                f"bytes/token: {', '.join(f'{name} {_bytes(size)}' for name, size in largest)}",
                f"  memory    {self._memory()}",
                f"  replicas  {self.replicas}, {self.at_a_time} at a time",
                f"  time      {self._time()}",
                f"  pays off  after {self.pays_off_after_runs} student run(s), against a teacher in the training loop",
            )
        )

    def _memory(self) -> str:
        memory = self.memory
        parts = {
            "weights": memory.weights_bytes,
            "keys and values": memory.kv_cache_bytes,
            "a chunk of logits": memory.chunk_bytes,
            "signals": memory.signals_bytes,
            "runtime": memory.runtime_bytes,
        }
        on_gpu = f"; {_bytes(self.gpu_bytes_per_rank)} of each rank's GPU at least" if self.gpu_bytes_per_rank else ""
        listed = ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items() if size)
        return f"{_bytes(memory.total_bytes)} a replica: {listed}{on_gpu}"

    def _time(self) -> str:
        if self.hours is None or self.tokens_per_s is None:
            return "unknown: pass --tokens-per-s or --probe"
        writing = ", plus the generation of the answers" if self.at_most else ""
        return f"{_hours(self.hours)} at {self.tokens_per_s:,.0f} tokens/s a replica{writing}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a run."""

    name: str
    storage: str
    teachers: tuple[TeacherPlan, ...]

    def as_json(self) -> dict[str, Any]:
        """Values for `--json`."""
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
        """Text for the terminal."""
        return "\n".join((f"plan {self.name}, storage {self.storage}", *(str(teacher) for teacher in self.teachers)))


@dataclass(frozen=True, slots=True)
class _Draft:
    """A teacher's requirements, before the number of concurrent replicas is known."""

    teacher: TeacherSpec
    spec: ShardSpec
    counts: Counts
    placement: Placement
    memory: Memory
    gpu_bytes: int

    @property
    def replicas(self) -> int:
        return min(self.teacher.replica_range[1], max(self.counts.units, 1))


def plan(recipe: Recipe, tokens_per_s: float | None = None, *, probe: bool = False) -> Plan:
    """Plan the recipe's captures. `tokens_per_s`: throughput of one replica; `probe` measures each teacher's own.

    Raises RecipeError where it cannot fit, what preparing the caches would raise (CorpusError, ModelError), and what a
    probe ends with (UsageError, EngineError).
    """
    machine = Machine.local(recipe.cluster)
    drafts = [_draft(recipe, teacher, machine) for teacher in recipe.teachers]
    running = _replicas_at_a_time(recipe, drafts, machine)
    _check_disk(recipe, sum(sum(_stored(draft).values()) for draft in drafts))
    teachers = []
    for draft in drafts:
        pace = measure_throughput(recipe, draft.teacher) if probe else tokens_per_s
        teachers.append(_finish(recipe, draft, running[draft.teacher.name], pace))
    return Plan(recipe.name, recipe.storage, tuple(teachers))


def _draft(recipe: Recipe, teacher: TeacherSpec, machine: Machine) -> _Draft:
    model, teacher = resolve_teacher_model(teacher), resolve_dtype(teacher, recipe)
    check_capture(recipe, teacher, model)
    spec = _shard_spec(recipe, teacher, model)
    placement = placement_for(teacher, machine.resources)
    if recipe.cluster.address == "local":
        check_fits(teacher, placement, machine.resources)
    on_gpu = "GPU" in placement.total and teacher.engine != "dummy"
    folder = None if model is None else model.path
    unit_tokens = recipe.capture.unit_sequences * recipe.corpus.sequence_length
    memory = teacher_memory(teacher, spec, folder, unit_tokens, on_gpu=on_gpu)
    longest = recipe.max_model_len(teacher)
    kv_bytes = 0 if model is None else kv_bytes_per_token(model.text_config, teacher.dtype) * longest
    gpu_bytes = gpu_bytes_per_rank(teacher, spec, folder, kv_bytes) if on_gpu else 0
    for problem in _memory_problems(recipe, teacher, machine, memory, kv_bytes, gpu_bytes):
        raise RecipeError(f"recipe {recipe.name} teacher {teacher.name}: {problem}")
    return _Draft(teacher, spec, count(recipe, teacher, model), placement, memory, gpu_bytes)


def _finish(recipe: Recipe, draft: _Draft, at_a_time: int, tokens_per_s: float | None) -> TeacherPlan:
    counts = draft.counts
    return TeacherPlan(
        name=draft.teacher.name,
        counts=counts,
        column_bytes=_stored(draft),
        at_most=bool(recipe.authors(draft.teacher)),
        memory=draft.memory,
        gpu_bytes_per_rank=draft.gpu_bytes,
        replicas=draft.replicas,
        at_a_time=at_a_time,
        tokens_per_s=tokens_per_s,
        hours=None if tokens_per_s is None else counts.total_tokens / tokens_per_s / at_a_time / 3600,
        pays_off_after_runs=pays_off_after(counts, recipe.training.epochs),
    )


def pays_off_after(counts: Counts, epochs: float) -> int:
    """Student runs after which one capture has taken less teacher time than a live teacher in every run.

    A live teacher scores the training tokens once an epoch and the held-out ones once, at the capture's throughput.
    """
    live_tokens = epochs * counts.tokens["train"] + counts.tokens["held_out"]
    return int(counts.total_tokens // max(live_tokens, 1.0)) + 1


def _replicas_at_a_time(recipe: Recipe, drafts: list[_Draft], machine: Machine) -> Mapping[str, int]:
    """Concurrent replicas of each teacher. Raises RecipeError where they exceed the machine's memory."""
    most = {draft.teacher.name: draft.replicas for draft in drafts}
    if recipe.cluster.address != "local":
        return most
    running = concurrent_replicas({draft.teacher.name: draft.placement for draft in drafts}, most, machine.resources)
    _check_memory(recipe, drafts, running, machine)
    for draft in drafts:  # a teacher that has finished frees its resources for the others
        alone = concurrent_replicas({draft.teacher.name: draft.placement}, most, machine.resources)
        _check_memory(recipe, [draft], alone, machine)
    return {name: max(1, replicas) for name, replicas in running.items()}


def _check_memory(recipe: Recipe, drafts: list[_Draft], running: Mapping[str, int], machine: Machine) -> None:
    sizes = {d.teacher.name: running[d.teacher.name] * d.memory.total_bytes for d in drafts}
    if sum(sizes.values()) > machine.memory_bytes:
        listed = ", ".join(f"{running[name]} of teacher {name} {_bytes(size)}" for name, size in sizes.items())
        raise RecipeError(
            f"recipe {recipe.name} teachers: {_bytes(sum(sizes.values()))} of memory for the replicas that run at a "
            f"time ({listed}), expected at most {_bytes(machine.memory_bytes)}, the memory of this machine; "
            "ask for fewer replicas, or for more placement.cpus each"
        )


def _shard_spec(recipe: Recipe, teacher: TeacherSpec, model: ModelFolder | None) -> ShardSpec:
    sizes = {} if model is None else model.text_config
    options = teacher.options
    return ShardSpec(
        capture=recipe.capture.spec(recipe.seed),
        vocabulary=int(options.get("vocabulary", sizes.get("vocab_size", 512))),
        hidden_width=int(options.get("width", sizes.get("hidden_size", 32))),
        layers=int(options.get("layers", sizes.get("num_hidden_layers", 4))),
    )


def _stored(draft: _Draft) -> dict[str, int]:
    counts = draft.counts
    average = max(2, round(counts.total_tokens / max(counts.sequences, 1)))
    per_token = column_bytes(draft.spec, average)
    audited_share = counts.audited_tokens / max(counts.total_tokens, 1)
    per_token["exact_hidden"] *= audited_share
    return {name: round(size * counts.total_tokens) for name, size in per_token.items()}


def _memory_problems(
    recipe: Recipe, teacher: TeacherSpec, machine: Machine, memory: Memory, kv_bytes: int, gpu_bytes: int
) -> Iterator[str]:
    if not gpu_bytes and kv_bytes > memory.kv_cache_bytes:
        yield (
            f"kv_cache_gib: keys and values of one sequence take {kv_bytes / 2**30:.2f} GiB, "
            f"expected at least that much, got {teacher.kv_cache_gib:g}"
        )
    if recipe.cluster.address != "local":
        return
    if memory.total_bytes > machine.memory_bytes:
        yield (
            f"a replica takes {_bytes(memory.total_bytes)} of memory, "
            f"expected at most {_bytes(machine.memory_bytes)}, the memory of this machine"
        )
    if gpu_bytes and machine.gpu_bytes:
        share = teacher.gpu_memory_share * teacher.gpu_fraction
        limit = int(share * min(machine.gpu_bytes))
        if gpu_bytes > limit:
            yield (
                f"a rank takes {_bytes(gpu_bytes)} of its GPU, expected at most {_bytes(limit)} ({share:.0%} of one); "
                "see teachers.tensor_parallel, quantization and gpu_memory_share"
            )


def _check_disk(recipe: Recipe, stored_bytes: int) -> None:
    folder: Path | None = Store.open(recipe.storage).local_path()
    if folder is None:
        return
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if stored_bytes > free:
        raise RecipeError(
            f"recipe {recipe.name} storage {folder}: the caches take {_bytes(stored_bytes)}, "
            f"expected at most {_bytes(free)}, which is free there"
        )


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
