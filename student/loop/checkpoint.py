"""Checkpoints: safetensors and JSON in any store, complete once their marker file exists.

    checkpoints/step-00000050/model-00000.safetensors        trained parameters and buffers, unsharded
    checkpoints/step-00000050/projections-00000.safetensors  projections of the feature loss
    checkpoints/step-00000050/optimizer-00000.safetensors    moments and step counts, `<slot>/<parameter>`
    checkpoints/step-00000050/whole.json                     marker, written last: progress, bytes and sha256 of files

The markers alone determine the latest checkpoint; nothing that Ray Train records is read.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
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

logger = logging.getLogger(__name__)

MARKER = "whole.json"
FILE_BYTES = 1 << 30
"""Target size of a safetensors file."""
SPARE = 0.05
"""Free disk space required beyond a checkpoint's tensors, as a share of their bytes: headers and logs."""

_STEP = re.compile(rf"{CHECKPOINTS}/step-(\d{{8}})/([^/]+)")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """State of a training after `step` optimizer steps, on the CPU."""

    step: int
    progress: dict[str, Any]
    """JSON values: tokens, seconds, loss, seed."""
    state_dicts: dict[str, dict[str, Tensor]]
    """`model`, `projections`, `optimizer`: tensors by name."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensors in self.state_dicts.values() for tensor in tensors.values())


@dataclass(frozen=True, slots=True)
class LatestCheckpoint:
    """The latest complete checkpoint, and a line for each later one that is incomplete or damaged."""

    snapshot: Snapshot | None
    warnings: tuple[str, ...]
    marker_sha256: str = ""
    """Digest of the marker, which has the digests of the files."""


def save_checkpoint(store: Store, snapshot: Snapshot) -> None:
    """Write the files, then the marker. Raises StorageError."""
    folder = _folder(snapshot.step)
    files: dict[str, dict[str, Any]] = {}
    for name, tensors in _files(snapshot.state_dicts):
        data = save(tensors)
        store.put(f"{folder}/{name}", data)
        files[name] = {"bytes": len(data), "sha256": sha256_bytes(data)}
        fault_point("mid_checkpoint", snapshot.step, 0)
    marker = {"step": snapshot.step, "state": snapshot.progress, "files": files}
    fault_point("before_marker", snapshot.step, 0)
    store.put(f"{folder}/{MARKER}", json.dumps(marker, indent=1).encode())
    fault_point("after_marker", snapshot.step, 0)


def load_latest(store: Store) -> LatestCheckpoint:
    """Load the latest checkpoint whose files have the bytes and digests in its marker."""
    warnings: list[str] = []
    for step, names in sorted(_files_by_step(store).items(), reverse=True):
        try:
            snapshot, sha256 = _load(store, step, names)
            return LatestCheckpoint(snapshot, tuple(warnings), sha256)
        except _IncompleteError as reason:
            warnings.append(f"checkpoint {store.where(_folder(step))}: {reason}; skipped")
    return LatestCheckpoint(None, tuple(warnings))


def load_step(store: Store, step: int, marker_sha256: str) -> Snapshot:
    """Load the checkpoint that rank 0 has loaded. Raises TrainingError if this rank reads other content."""
    where = f"checkpoint {store.where(_folder(step))}"
    try:
        snapshot, sha256 = _load(store, step, _files_by_step(store).get(step, set()))
    except _IncompleteError as reason:
        raise TrainingError(f"{where}: {reason}, but rank 0 has loaded it; ranks need one shared storage") from None
    if sha256 != marker_sha256:
        raise TrainingError(
            f"{where}: expected the {MARKER} that rank 0 has read (sha256 {marker_sha256[:16]}), got {sha256[:16]}; "
            "ranks need one shared storage"
        )
    return snapshot


def latest_step(store: Store) -> int:
    """Step of the latest checkpoint that has a marker, or 0. Reads names only."""
    return max((step for step, names in _files_by_step(store).items() if MARKER in names), default=0)


def free_disk_bytes(store: Store) -> int | None:
    """Free bytes on the store's disk, or None if the store is not local."""
    local = store.local_path()
    if local is None:
        return None
    existing = next(folder for folder in (local, *local.parents) if folder.exists())
    return shutil.disk_usage(existing).free


def delete_old_checkpoints(store: Store, keep: int) -> None:
    """Delete everything older than the latest `keep` complete checkpoints."""
    files = _files_by_step(store)
    complete = sorted(step for step, names in files.items() if MARKER in names)
    oldest_kept = complete[-keep:][0] if complete else 0
    for step in sorted(files):
        if step < oldest_kept:
            _delete(store, step, files[step])


def delete_all_checkpoints(store: Store) -> None:
    """Delete every checkpoint, complete or not."""
    for step, names in _files_by_step(store).items():
        _delete(store, step, names)
        fault_point("mid_clear", step, 0)
    remove_folder(store, CHECKPOINTS)


def _delete(store: Store, step: int, names: set[str]) -> None:
    """Delete the marker first: without it the checkpoint is incomplete."""
    if MARKER in names:
        store.delete(f"{_folder(step)}/{MARKER}")
    remove_folder(store, _folder(step))


class CheckpointWriter:
    """Saves one checkpoint at a time in a background thread, whose error the next call raises.

    Keeps `keep` checkpoints, and one more while it is written. If a local disk has too little space for that, all but
    the latest are deleted first; if that is not enough, the checkpoint is skipped with a warning.
    """

    def __init__(self, store: Store, keep: int) -> None:
        self._store, self._keep = store, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, snapshot: Snapshot, files: Mapping[str, bytes] | None = None) -> None:
        """Wait for the previous snapshot, then start to write this one. `files`, by path, are written first."""
        self.wait()
        self._pending = self._thread.submit(self._write, snapshot, files or {})

    def wait(self) -> None:
        """Wait until everything is written. Raises the error of the background thread."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Stop the background thread. Raises nothing: call `wait` first."""
        self._thread.shutdown(wait=True)

    def _write(self, snapshot: Snapshot, files: Mapping[str, bytes]) -> None:
        for path, data in files.items():
            self._store.put(path, data)
        if self._make_space(snapshot):
            save_checkpoint(self._store, snapshot)
            delete_old_checkpoints(self._store, self._keep)

    def _make_space(self, snapshot: Snapshot) -> bool:
        needed_bytes = round(snapshot.size_bytes * (1.0 + SPARE))
        free_bytes = free_disk_bytes(self._store)
        if free_bytes is not None and free_bytes < needed_bytes:
            delete_old_checkpoints(self._store, 1)
            free_bytes = free_disk_bytes(self._store)
        if free_bytes is None or free_bytes >= needed_bytes:
            return True
        logger.warning(
            "checkpoint %s: skipped: expected %.2f GiB of free disk space, got %.2f GiB; training goes on, the next "
            "checkpoint is tried again; free some disk space",
            self._store.where(_folder(snapshot.step)),
            needed_bytes / 2**30,
            free_bytes / 2**30,
        )
        return False


class _IncompleteError(Exception):
    pass


def _load(store: Store, step: int, names: set[str]) -> tuple[Snapshot, str]:
    """Load and verify a checkpoint. Returns it with its marker's sha256; raises _IncompleteError."""
    if MARKER not in names:
        raise _IncompleteError(f"incomplete (no {MARKER})")
    try:
        marker_bytes = store.read(f"{_folder(step)}/{MARKER}")
        marker = json.loads(marker_bytes)
        files, progress = marker["files"], marker["state"]
    except (ValueError, KeyError, TypeError, StorageError) as error:
        raise _IncompleteError(f"{MARKER} cannot be read") from error
    state_dicts: dict[str, dict[str, Tensor]] = {}
    for name, expected in files.items():
        data = store.read_if_present(f"{_folder(step)}/{name}")
        if data is None or len(data) != expected["bytes"] or sha256_bytes(data) != expected["sha256"]:
            got = "is missing" if data is None else f"has {len(data)} bytes or another sha256"
            raise _IncompleteError(f"{name} {got} (expected {expected['bytes']} bytes)")
        try:
            state_dicts.setdefault(name.rpartition("-")[0], {}).update(load(data))
        except SafetensorError as error:
            raise _IncompleteError(f"{name}: {error}") from error
    return Snapshot(step, progress, state_dicts), sha256_bytes(marker_bytes)


def _files(state_dicts: Mapping[str, Mapping[str, Tensor]]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name and tensors of every file: each state dict, split into files of about FILE_BYTES."""
    for key, tensors in state_dicts.items():
        number, size_bytes = 0, 0
        file: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if file and size_bytes + tensor.nbytes > FILE_BYTES:
                yield f"{key}-{number:05d}.safetensors", file
                number, size_bytes, file = number + 1, 0, {}
            file[name] = tensor
            size_bytes += tensor.nbytes
        if file:
            yield f"{key}-{number:05d}.safetensors", file


def _files_by_step(store: Store) -> dict[int, set[str]]:
    files: dict[int, set[str]] = {}
    for path in store.list(CHECKPOINTS):
        if match := _STEP.fullmatch(path):
            files.setdefault(int(match[1]), set()).add(match[2])
    return files


def _folder(step: int) -> str:
    return f"{CHECKPOINTS}/step-{step:08d}"
