"""What a training leaves to be looked at: one line a step on the terminal, JSONL and TensorBoard always.

`log.jsonl` holds what is the same however often a training was interrupted; what a clock says goes to
`timing.jsonl`. Both have one line a step, and a resumed training cuts them back to its checkpoint first.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from pipeline.cache.storage import Store
from pipeline.errors import RecipeError

LOG, TIMING, TENSORBOARD = "log.jsonl", "timing.jsonl", "tensorboard"
LINE_EVERY_S = 0.5

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
    """Event files under `tensorboard/`, uploaded at the end where the store is not local."""

    def __init__(self, store: Store, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._store = store
        local = store.local_path()
        self._folder = Path(tempfile.mkdtemp(prefix="stillhouse-")) if local is None else local / TENSORBOARD
        self._writer = SummaryWriter(str(self._folder), purge_step=first_step or None)

    def log(self, step: int, values: Values) -> None:
        """One scalar a value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush, and upload if needed."""
        self._writer.close()
        if self._store.local_path() is None:
            for file in self._folder.iterdir():
                self._store.put(f"{TENSORBOARD}/{file.name}", file.read_bytes())


class MLflow:
    """A run of MLflow, wherever MLFLOW_TRACKING_URI points to."""

    def __init__(self, run_name: str) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise RecipeError("training.trackers: mlflow is not installed; pip install 'stillhouse[track]'") from error
        self._mlflow = mlflow
        mlflow.start_run(run_name=run_name)

    def log(self, step: int, values: Values) -> None:
        """All values at once."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class WeightsAndBiases:
    """A run of Weights & Biases, as its own environment variables say."""

    def __init__(self, run_name: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise RecipeError("training.trackers: wandb is not installed; pip install 'stillhouse[track]'") from error
        self._run = wandb.init(project="stillhouse", name=run_name, id=run_name.replace("/", "-"), resume="allow")

    def log(self, step: int, values: Values) -> None:
        """All values at once."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def open_trackers(names: Sequence[str], store: Store, run_name: str, first_step: int) -> list[Tracker]:
    """TensorBoard, and those that the recipe names. Raises RecipeError where one is not installed."""
    trackers: list[Tracker] = [TensorBoard(store, first_step)]
    if "mlflow" in names:
        trackers.append(MLflow(run_name))
    if "wandb" in names:
        trackers.append(WeightsAndBiases(run_name))
    return trackers


class StepLines:
    """One line a step on the terminal, at most two a second; the last step always has its line."""

    def __init__(self, title: str, steps: int, first_step: int, say: Callable[[str], None]) -> None:
        self._title, self._steps, self._first_step, self._say = title, steps, first_step, say
        self._started_s = time.monotonic()
        self._shown_s = float("-inf")

    def show(self, log: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Say the step, unless the line before is too fresh."""
        now_s, step = time.monotonic(), int(log["step"])
        if now_s - self._shown_s < LINE_EVERY_S and step < self._steps:
            return
        self._shown_s = now_s
        done = step - self._first_step
        left_s = (now_s - self._started_s) / max(1, done) * (self._steps - step)
        parts = " ".join(f"{name} {log[name]:.4f}" for name in ("kd", "ce", "feature", "relation") if name in log)
        fields = [
            f"{self._title} step {step}/{self._steps}",
            f"loss {log['loss']:.4f} {parts}",
            f"norm {log['gradient_norm']:.2f}",
            f"{timing['tokens_per_s']:.0f} tokens/s",
            f"{timing['memory_bytes'] / 2**30:.2f} GiB",
            f"input wait {100 * timing['input_wait_share']:.1f} %",
            f"{duration(left_s)} left",
        ]
        self._say(" | ".join(fields))


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
