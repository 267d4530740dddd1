"""What a run will take, before anything starts: tokens, bytes by column, memory, hours, and when the cache pays off.

From the recipe, the corpus and the models' configs alone, and where asked from a short probe; nothing is written. What
cannot fit is refused with the reason: CPUs, GPUs and memory of this machine and its Ray, room on the disk, one
sequence's keys and values. Of a cluster that is joined nothing is known here.
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
from pipeline.planning.resources import Machine, Placement, check_fits, placement_for, side_by_side
from pipeline.planning.token_counts import Counts, count
from pipeline.run.launch import measure_throughput


@dataclass(frozen=True, slots=True)
class TeacherPlan:
    """What one teacher's cache will take."""

    name: str
    counts: Counts
    column_bytes: dict[str, int]
    """Stored bytes of each column, over the whole cache."""
    at_most: bool
    """The teacher's sequences hold answers that are not written yet: they count at their longest."""
    memory: Memory
    """Of one replica, on its node."""
    gpu_bytes_per_rank: int
    """0 without a GPU."""
    replicas: int
    at_a_time: int
    """Replicas that run side by side with the other teachers'; the others wait for their places."""
    tokens_per_s: float | None
    """Of one replica, as given or probed."""
    hours: float | None
    """Of scoring, with as many replicas as run at a time; None where no pace is known."""
    pays_off_after_runs: int
    """Student runs from which on the cache has cost less teacher time than a teacher in the training loop would, at
    the capture's own pace."""

    @property
    def stored_bytes(self) -> int:
        """Of all shards."""
        return sum(self.column_bytes.values())

    def __str__(self) -> str:
        counts = self.counts
        largest = sorted(self.column_bytes.items(), key=lambda item: -item[1])[:8]
        bound = ", at most: answers count at their longest" if self.at_most else ""
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
                f"  pays off  after {self.pays_off_after_runs} student run(s), against a teacher in the training loop "
                "that reads at the capture's pace",
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
            return "unknown: give --tokens-per-s or --probe"
        writing = ", and the writing of the answers" if self.at_most else ""
        return f"{_hours(self.hours)} at {self.tokens_per_s:,.0f} tokens/s a replica{writing}"


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


@dataclass(frozen=True, slots=True)
class _Draft:
    """A teacher's needs, before it is known how many replicas run at a time."""

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
    """What the recipe's captures take. `tokens_per_s` is one replica's pace; `probe` lets every teacher show its own.

    Raises RecipeError where it cannot fit, what preparing the caches would raise (CorpusError, ModelError), and what a
    probe ends with (UsageError, EngineError).
    """
    machine = Machine.here(recipe.cluster)
    drafts = [_draft(recipe, teacher, machine) for teacher in recipe.teachers]
    running = _at_a_time(recipe, drafts, machine)
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
    if _is_local(recipe):
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
    """The number of student runs from which on capturing once has taken less teacher time than reading in every run.

    A run with a live teacher reads the training tokens once an epoch, and the held-out ones once. It is taken to read
    at the capture's own pace: what it saves by storing nothing is overlapped in a capture too.
    """
    live_tokens = epochs * counts.tokens["train"] + counts.tokens["held_out"]
    return int(counts.total_tokens // max(live_tokens, 1.0)) + 1


def _is_local(recipe: Recipe) -> bool:
    return recipe.cluster.address == "local"


def _at_a_time(recipe: Recipe, drafts: list[_Draft], machine: Machine) -> Mapping[str, int]:
    """Replicas of each teacher that run side by side. Raises RecipeError where their memory would not do."""
    most = {draft.teacher.name: draft.replicas for draft in drafts}
    if not _is_local(recipe):
        return most
    running = side_by_side({draft.teacher.name: draft.placement for draft in drafts}, most, machine.resources)
    _check_memory(recipe, drafts, running, machine)
    for draft in drafts:  # teachers that are done give their places to those that wait
        alone = side_by_side({draft.teacher.name: draft.placement}, most, machine.resources)
        _check_memory(recipe, [draft], alone, machine)
    return {name: max(1, replicas) for name, replicas in running.items()}


def _check_memory(recipe: Recipe, drafts: list[_Draft], running: Mapping[str, int], machine: Machine) -> None:
    sizes = {d.teacher.name: running[d.teacher.name] * d.memory.total_bytes for d in drafts}
    if sum(sizes.values()) > machine.memory_bytes:
        listed = ", ".join(f"{running[name]} of teacher {name} {_bytes(size)}" for name, size in sizes.items())
        raise RecipeError(
            f"recipe {recipe.name} teachers: {_bytes(sum(sizes.values()))} of memory for the replicas that run at a "
            f"time ({listed}), expected at most {_bytes(machine.memory_bytes)}, all there is; "
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
    if not _is_local(recipe):
        return
    if memory.total_bytes > machine.memory_bytes:
        yield (
            f"a replica takes {_bytes(memory.total_bytes)} of memory, "
            f"expected at most {_bytes(machine.memory_bytes)}, all there is"
        )
    if gpu_bytes and machine.gpu_bytes:
        share = teacher.gpu_memory_share * teacher.gpu_fraction
        room = int(share * min(machine.gpu_bytes))
        if gpu_bytes > room:
            yield (
                f"a rank takes {_bytes(gpu_bytes)} of its GPU, expected at most {_bytes(room)} ({share:.0%} of one); "
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
