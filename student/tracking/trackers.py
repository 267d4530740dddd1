"""What a training leaves to be looked at: JSONL and TensorBoard always, MLflow and Weights & Biases where asked for.

`log.jsonl` holds what is the same however often a training was interrupted; what a clock says goes to
`timing.jsonl`. Both have one line a step, and a resumed training cuts them back to its checkpoint first.
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
"""Which run of each tracker is this training's: a resumed one goes on with it."""

Values = Mapping[str, float | int]


class Tracker(Protocol):
    """Somewhere that a step's values go to."""

    def log(self, step: int, values: Values) -> None:
        """Take one step's values."""
        ...

    def close(self) -> None:
        """Make sure that everything is kept."""
        ...


class JsonLines:
    """A file of one JSON object a step: appended to where it is local, put with every checkpoint where it is not."""

    def __init__(self, store: Store, name: str, first_step: int) -> None:
        self._store, self.name = store, name
        kept = (store.read_if_present(name) or b"").decode().splitlines()[:first_step]
        self._lines = [line for line in kept if line]
        store.put(name, self.content())
        folder = store.local_path()
        self._file: IO[str] | None = None if folder is None else (folder / name).open("a")

    def write(self, values: Mapping[str, Any]) -> None:
        """Add a line."""
        self._lines.append(json.dumps(values))
        if self._file is not None:
            self._file.write(self._lines[-1] + "\n")
            self._file.flush()

    @property
    def in_place(self) -> bool:
        """Whether lines are on storage as soon as they are written."""
        return self._file is not None

    def content(self) -> bytes:
        """The whole file."""
        return "".join(line + "\n" for line in self._lines).encode()

    def close(self) -> None:
        """Put what a remote store does not have yet."""
        if self._file is not None:
            self._file.close()
        else:
            self._store.put(self.name, self.content())


class TensorBoard:
    """Event files under `tensorboard/`: written in place, or put with every checkpoint where the store is remote."""

    def __init__(self, store: Store, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._store = store
        if first_step == 0:
            for path in store.list(TENSORBOARD):
                store.delete(path)
        local = store.local_path()
        self._folder = Path(tempfile.mkdtemp(prefix="stillhouse-")) if local is None else local / TENSORBOARD
        # Steps are counted from 1: what an attempt before has noted after the checkpoint is hidden, no more.
        self._writer = SummaryWriter(str(self._folder), purge_step=first_step + 1)

    def log(self, step: int, values: Values) -> None:
        """One scalar a value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def contents(self) -> dict[str, bytes]:
        """The event files up to now, where the store does not have them in place."""
        self._writer.flush()
        if self._store.local_path() is not None:
            return {}
        return {f"{TENSORBOARD}/{file.name}": file.read_bytes() for file in self._folder.iterdir()}

    def close(self) -> None:
        """Flush, and upload if needed."""
        self._writer.close()
        if self._store.local_path() is None:
            for path, data in self.contents().items():
                self._store.put(path, data)
            shutil.rmtree(self._folder)


class MLflow:
    """A run of MLflow, wherever MLFLOW_TRACKING_URI points to."""

    def __init__(self, run_name: str, run_id: str | None) -> None:
        import mlflow

        self._mlflow = mlflow
        self.run_id = str(mlflow.start_run(run_id=run_id, run_name=run_name).info.run_id)

    def log(self, step: int, values: Values) -> None:
        """All values at once."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class WeightsAndBiases:
    """A run of Weights & Biases, as its own environment variables say."""

    def __init__(self, run_name: str, run_id: str | None) -> None:
        import wandb

        self.run_id = run_id or uuid.uuid4().hex
        self._run = wandb.init(project="stillhouse", name=run_name, id=self.run_id, resume="allow")

    def log(self, step: int, values: Values) -> None:
        """All values at once."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


_EXTRAS: dict[str, Callable[[str, str | None], MLflow | WeightsAndBiases]] = {
    "mlflow": MLflow,
    "wandb": WeightsAndBiases,
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise RecipeError where the package of a tracker is missing. Imports none of them."""
    for name in names:
        if find_spec(name) is None:
            raise RecipeError(f"training.trackers: {name} is not installed; pip install 'stillhouse[track]'")


def open_trackers(names: Sequence[str], store: Store, run_name: str) -> list[Tracker]:
    """Those that the recipe names, each with the run that this training has begun, if it has."""
    runs = json.loads(store.read_if_present(RUNS_JSON) or b"{}")
    opened = {name: _EXTRAS[name](run_name, runs.get(name)) for name in names}
    if opened:
        store.put(RUNS_JSON, json.dumps(runs | {name: one.run_id for name, one in opened.items()}).encode())
    return list(opened.values())
