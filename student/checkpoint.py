"""Checkpoints: safetensors and JSON in any store, whole only once their marker stands.

    checkpoints/step-00000050/model-00000.safetensors        trained parameters and buffers, whole
    checkpoints/step-00000050/projections-00000.safetensors  what stays outside the student
    checkpoints/step-00000050/optimizer-00000.safetensors    moments and step counts, `<slot>/<parameter>`
    checkpoints/step-00000050/whole.json                     written last: state, and every file's bytes and sha256

Nothing else says which checkpoint is the newest: no listing of tensors, no record of Ray's.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pipeline.cache.storage import Store
from pipeline.errors import StorageError
from pipeline.identity import sha256_bytes
from student.faults import reach

FOLDER = "checkpoints"
MARKER = "whole.json"
FILE_BYTES = 1 << 30
"""Tensors are gathered into files of about this size."""

_STEP = re.compile(rf"{FOLDER}/step-(\d{{8}})/([^/]+)")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A training's state after `step` optimizer steps, on the CPU."""

    step: int
    state: dict[str, Any]
    """A few readable values; JSON."""
    sections: dict[str, dict[str, Tensor]]
    """`model`, `projections`, `optimizer`: tensors by name."""


@dataclass(frozen=True, slots=True)
class Found:
    """The newest whole checkpoint, and one line for each newer or half one that was passed over."""

    snapshot: Snapshot | None
    notes: tuple[str, ...]


def save_checkpoint(store: Store, snapshot: Snapshot) -> None:
    """Write every file, then the marker. Raises StorageError."""
    folder = _folder(snapshot.step)
    files: dict[str, dict[str, Any]] = {}
    for name, tensors in _files(snapshot.sections):
        data = save(tensors)
        store.put(f"{folder}/{name}", data)
        files[name] = {"bytes": len(data), "sha256": sha256_bytes(data)}
        reach("mid_checkpoint", snapshot.step, 0)
    marker = {"step": snapshot.step, "state": snapshot.state, "files": files}
    reach("before_marker", snapshot.step, 0)
    store.put(f"{folder}/{MARKER}", json.dumps(marker, indent=1).encode())
    reach("after_marker", snapshot.step, 0)


def find_newest(store: Store) -> Found:
    """The newest checkpoint whose marker stands and whose files are what the marker says."""
    notes: list[str] = []
    for step, names in sorted(_present(store).items(), reverse=True):
        try:
            return Found(_load(store, step, names), tuple(notes))
        except _NotWholeError as reason:
            notes.append(f"checkpoint {store.where(_folder(step))}: {reason}; passed over")
    return Found(None, tuple(notes))


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


def _delete(store: Store, step: int, names: set[str]) -> None:
    """The marker first, so that nobody takes the rest for whole; then the folder, where there are folders."""
    for name in sorted(names, key=lambda name: name != MARKER):
        store.delete(f"{_folder(step)}/{name}")
    local = store.local_path()
    if local is not None:
        with contextlib.suppress(OSError):
            (local / _folder(step)).rmdir()


class CheckpointWriter:
    """Saves in the background, one at a time; whatever goes wrong is raised by the next call."""

    def __init__(self, store: Store, keep: int) -> None:
        self._store, self._keep = store, keep
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
        save_checkpoint(self._store, snapshot)
        prune(self._store, self._keep)


class _NotWholeError(Exception):
    pass


def _load(store: Store, step: int, names: set[str]) -> Snapshot:
    if MARKER not in names:
        raise _NotWholeError(f"half written (no {MARKER})")
    try:
        marker = json.loads(store.read(f"{_folder(step)}/{MARKER}"))
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
    return Snapshot(step, state, sections)


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
    for path in store.list(FOLDER):
        if match := _STEP.fullmatch(path):
            present.setdefault(int(match[1]), set()).add(match[2])
    return present


def _folder(step: int) -> str:
    return f"{FOLDER}/step-{step:08d}"
