"""Experiment trackers: JSON Lines and TensorBoard always, MLflow and Weights & Biases if the recipe names them.

`log.jsonl` has one line per step and is equal however often a training was interrupted; measured times are in
`timing.jsonl`. A resumed training first truncates both to its checkpoint.
"""

import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Protocol

from pipeline.cache.storage.store import Store
from pipeline.errors import RecipeError

LOG, TIMING, TENSORBOARD = "log.jsonl", "timing.jsonl", "tensorboard"
RUNS_JSON = "trackers.json"
"""Run id by tracker, for a training that resumes."""

Values = Mapping[str, float | int]


class Tracker(Protocol):
    """Receives the metrics of every step."""

    def log(self, step: int, values: Values) -> None:
        """Log the values of one step."""

    def close(self) -> None:
        """Flush and close."""


class JsonLines:
    """A JSON Lines file, one object per step: appended to in a local store, else uploaded with every checkpoint."""

    def __init__(self, store: Store, name: str, first_step: int) -> None:
        self._store, self.name = store, name
        kept = (store.read_if_present(name) or b"").decode().splitlines()[:first_step]
        self._lines = [line for line in kept if line]
        store.put(name, self.content())
        folder = store.local_path()
        self._file: IO[str] | None = None if folder is None else (folder / name).open("a")

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line."""
        self._lines.append(json.dumps(values))
        if self._file is not None:
            self._file.write(self._lines[-1] + "\n")
            self._file.flush()

    @property
    def in_place(self) -> bool:
        """Whether `write` appends to the stored file: the store is local."""
        return self._file is not None

    def content(self) -> bytes:
        """All lines, as bytes."""
        return "".join(line + "\n" for line in self._lines).encode()

    def close(self) -> None:
        """Close the local file, or upload to a remote store."""
        if self._file is not None:
            self._file.close()
        else:
            self._store.put(self.name, self.content())


class TensorBoard:
    """Event files in `tensorboard/`: written in place in a local store, uploaded with every checkpoint elsewhere."""

    def __init__(self, store: Store, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._store = store
        if first_step == 0:
            for path in store.list(TENSORBOARD):
                store.delete(path)
        local = store.local_path()
        self._folder = Path(tempfile.mkdtemp(prefix="stillhouse-")) if local is None else local / TENSORBOARD
        # Steps are counted from 1. `purge_step` makes TensorBoard hide the later steps of an earlier attempt.
        self._writer = SummaryWriter(str(self._folder), purge_step=first_step + 1)

    def log(self, step: int, values: Values) -> None:
        """Add one scalar per value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def contents(self) -> dict[str, bytes]:
        """Event files by path; none in a local store."""
        self._writer.flush()
        if self._store.local_path() is not None:
            return {}
        return {f"{TENSORBOARD}/{file.name}": file.read_bytes() for file in self._folder.iterdir()}

    def close(self) -> None:
        """Flush, and upload to a remote store."""
        self._writer.close()
        if self._store.local_path() is None:
            for path, data in self.contents().items():
                self._store.put(path, data)
            shutil.rmtree(self._folder)


class MLflow:
    """A run of MLflow at MLFLOW_TRACKING_URI."""

    def __init__(self, run_name: str, run_id: str | None) -> None:
        import mlflow

        self._mlflow = mlflow
        self.run_id = str(mlflow.start_run(run_id=run_id, run_name=run_name).info.run_id)

    def log(self, step: int, values: Values) -> None:
        """Log all values in one call."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class WeightsAndBiases:
    """A run of Weights & Biases, configured by its own environment variables."""

    def __init__(self, run_name: str, run_id: str | None) -> None:
        import wandb

        self.run_id = run_id or uuid.uuid4().hex
        self._run = wandb.init(project="stillhouse", name=run_name, id=self.run_id, resume="allow")

    def log(self, step: int, values: Values) -> None:
        """Log all values in one call."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


_TRACKERS: dict[str, Callable[[str, str | None], MLflow | WeightsAndBiases]] = {
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise RecipeError if a tracker's package is not installed. Imports none."""
    for name in names:
        if find_spec(name) is None:
            raise RecipeError(f"training.trackers: {name} is not installed; pip install 'stillhouse[track]'")


def open_trackers(names: Sequence[str], store: Store, run_name: str) -> list[Tracker]:
    """Open the named trackers, each with this training's run of an earlier attempt, if any."""
    runs = json.loads(store.read_if_present(RUNS_JSON) or b"{}")
    opened = {name: _TRACKERS[name](run_name, runs.get(name)) for name in names}
    if opened:
        store.put(RUNS_JSON, json.dumps(runs | {name: one.run_id for name, one in opened.items()}).encode())
    return list(opened.values())
