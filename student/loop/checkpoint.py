"""Checkpoints: safetensors and JSON in any store, whole only once their marker stands.

    checkpoints/step-00000050/model-00000.safetensors        trained parameters and buffers, whole
    checkpoints/step-00000050/projections-00000.safetensors  what stays outside the student
    checkpoints/step-00000050/optimizer-00000.safetensors    moments and step counts, `<slot>/<parameter>`
    checkpoints/step-00000050/whole.json                     written last: state, and every file's bytes and sha256

Nothing else says which checkpoint is the newest: no listing of tensors, no record of Ray's.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pipeline.cache.storage.store import Store
from pipeline.errors import StorageError, TrainingError
from pipeline.identity import sha256_bytes
from student.loop.fault_points import fault_point
from student.training_job import CHECKPOINTS, remove_folder

MARKER = "whole.json"
FILE_BYTES = 1 << 30
"""Tensors are gathered into files of about this size."""
SPARE = 0.05
"""Share of a checkpoint's bytes that a disk must have free beside it, for headers and logs."""

_STEP = re.compile(rf"{CHECKPOINTS}/step-(\d{{8}})/([^/]+)")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A training's state after `step` optimizer steps, on the CPU."""

    step: int
    state: dict[str, Any]
    """A few readable values; JSON."""
    sections: dict[str, dict[str, Tensor]]
    """`model`, `projections`, `optimizer`: tensors by name."""

    @property
    def size_bytes(self) -> int:
        """Of all tensors: what a checkpoint takes on disk, headers aside."""
        return sum(tensor.nbytes for tensors in self.sections.values() for tensor in tensors.values())


@dataclass(frozen=True, slots=True)
class Found:
    """The newest whole checkpoint, and one line for each newer or half one that was passed over."""

    snapshot: Snapshot | None
    notes: tuple[str, ...]
    marker_sha256: str = ""
    """Of the snapshot's marker, and through it of every byte of the checkpoint."""


def save_checkpoint(store: Store, snapshot: Snapshot) -> None:
    """Write every file, then the marker. Raises StorageError."""
    folder = _folder(snapshot.step)
    files: dict[str, dict[str, Any]] = {}
    for name, tensors in _files(snapshot.sections):
        data = save(tensors)
        store.put(f"{folder}/{name}", data)
        files[name] = {"bytes": len(data), "sha256": sha256_bytes(data)}
        fault_point("mid_checkpoint", snapshot.step, 0)
    marker = {"step": snapshot.step, "state": snapshot.state, "files": files}
    fault_point("before_marker", snapshot.step, 0)
    store.put(f"{folder}/{MARKER}", json.dumps(marker, indent=1).encode())
    fault_point("after_marker", snapshot.step, 0)


def find_newest(store: Store) -> Found:
    """The newest checkpoint whose marker stands and whose files are what the marker says."""
    notes: list[str] = []
    for step, names in sorted(_present(store).items(), reverse=True):
        try:
            snapshot, sha256 = _load(store, step, names)
            return Found(snapshot, tuple(notes), sha256)
        except _NotWholeError as reason:
            notes.append(f"checkpoint {store.where(_folder(step))}: {reason}; passed over")
    return Found(None, tuple(notes))


def load_exactly(store: Store, step: int, marker_sha256: str) -> Snapshot:
    """The checkpoint that another rank has found. Raises TrainingError where this rank sees anything else."""
    where = f"checkpoint {store.where(_folder(step))}"
    try:
        snapshot, sha256 = _load(store, step, _present(store).get(step, set()))
    except _NotWholeError as reason:
        raise TrainingError(f"{where}: {reason}, but rank 0 has read it whole; ranks need one common storage") from None
    if sha256 != marker_sha256:
        raise TrainingError(
            f"{where}: expected the {MARKER} that rank 0 has read (sha256 {marker_sha256[:16]}), got {sha256[:16]}; "
            "ranks need one common storage"
        )
    return snapshot


def newest_step(store: Store) -> int:
    """The step of the newest checkpoint whose marker stands, 0 where there is none. Reads no checkpoint."""
    return max((step for step, names in _present(store).items() if MARKER in names), default=0)


def room_bytes(store: Store) -> int | None:
    """Bytes that the store's disk has free; None where it is no local folder."""
    local = store.local_path()
    if local is None:
        return None
    standing = next(folder for folder in (local, *local.parents) if folder.exists())
    return shutil.disk_usage(standing).free


def prune(store: Store, keep: int) -> None:
    """Delete all but the newest `keep` whole checkpoints, and halves older than those."""
    present = _present(store)
    whole = sorted(step for step, names in present.items() if MARKER in names)
    oldest_kept = whole[-keep:][0] if whole else 0
    for step in sorted(present):
        if step < oldest_kept:
            _delete(store, step, present[step])


def clear(store: Store) -> None:
    """Delete every checkpoint."""
    for step, names in _present(store).items():
        _delete(store, step, names)
        fault_point("mid_clear", step, 0)
    remove_folder(store, CHECKPOINTS)


def _delete(store: Store, step: int, names: set[str]) -> None:
    """The marker first, so that nobody takes the rest for whole."""
    if MARKER in names:
        store.delete(f"{_folder(step)}/{MARKER}")
    remove_folder(store, _folder(step))


class CheckpointWriter:
    """Saves in the background, one at a time; whatever goes wrong is raised by the next call.

    Holds `keep` checkpoints, and one more while it is written. Where a local disk has no room for that, older ones go
    first; where it has none even then, the checkpoint is left out and `say` takes a line: training goes on.
    """

    def __init__(self, store: Store, keep: int, say: Callable[[str], None]) -> None:
        self._store, self._keep, self._say = store, keep, say
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, snapshot: Snapshot, before: Mapping[str, bytes] | None = None) -> None:
        """Start writing a snapshot, once the one before is written. `before`: files that must stand first."""
        self.wait()
        self._pending = self._thread.submit(self._write, snapshot, before or {})

    def wait(self) -> None:
        """Return once everything is written. Raises what went wrong."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Let the thread go; call `wait` before to hear of errors."""
        self._thread.shutdown(wait=True)

    def _write(self, snapshot: Snapshot, before: Mapping[str, bytes]) -> None:
        for path, data in before.items():
            self._store.put(path, data)
        if not self._has_room(snapshot):
            return
        save_checkpoint(self._store, snapshot)
        prune(self._store, self._keep)

    def _has_room(self, snapshot: Snapshot) -> bool:
        needed_bytes = round(snapshot.size_bytes * (1.0 + SPARE))
        free_bytes = room_bytes(self._store)
        if free_bytes is not None and free_bytes < needed_bytes:
            prune(self._store, 1)
            free_bytes = room_bytes(self._store)
        if free_bytes is None or free_bytes >= needed_bytes:
            return True
        self._say(
            f"checkpoint {self._store.where(_folder(snapshot.step))}: left out: it needs "
            f"{needed_bytes / 2**30:.2f} GiB, {free_bytes / 2**30:.2f} GiB are free; "
            "the next one is tried after as many steps again"
        )
        return False


class _NotWholeError(Exception):
    pass


def _load(store: Store, step: int, names: set[str]) -> tuple[Snapshot, str]:
    """The snapshot, and its marker's sha256."""
    if MARKER not in names:
        raise _NotWholeError(f"half written (no {MARKER})")
    try:
        marker_bytes = store.read(f"{_folder(step)}/{MARKER}")
        marker = json.loads(marker_bytes)
        files, state = marker["files"], marker["state"]
    except (ValueError, KeyError, TypeError, StorageError) as error:
        raise _NotWholeError(f"{MARKER} cannot be read") from error
    sections: dict[str, dict[str, Tensor]] = {}
    for name, expected in files.items():
        data = store.read_if_present(f"{_folder(step)}/{name}")
        if data is None or len(data) != expected["bytes"] or sha256_bytes(data) != expected["sha256"]:
            got = "is missing" if data is None else f"has {len(data)} bytes or another content"
            raise _NotWholeError(f"{name} {got} (expected {expected['bytes']} bytes)")
        try:
            sections.setdefault(name.rpartition("-")[0], {}).update(load(data))
        except SafetensorError as error:
            raise _NotWholeError(f"{name}: {error}") from error
    return Snapshot(step, state, sections), sha256_bytes(marker_bytes)


def _files(sections: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for section, tensors in sections.items():
        number, size_bytes = 0, 0
        gathered: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if gathered and size_bytes + tensor.nbytes > FILE_BYTES:
                yield f"{section}-{number:05d}.safetensors", gathered
                number, size_bytes, gathered = number + 1, 0, {}
            gathered[name] = tensor
            size_bytes += tensor.nbytes
        if gathered:
            yield f"{section}-{number:05d}.safetensors", gathered


def _present(store: Store) -> dict[int, set[str]]:
    present: dict[int, set[str]] = {}
    for path in store.list(CHECKPOINTS):
        if match := _STEP.fullmatch(path):
            present.setdefault(int(match[1]), set()).add(match[2])
    return present


def _folder(step: int) -> str:
    return f"{CHECKPOINTS}/step-{step:08d}"
