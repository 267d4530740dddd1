"""What the leading rank writes down of every step: the log, its timing, the trackers, and a line on the terminal."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch

from student.data.prefetch import LoadedStep
from student.loop.step import StepResult
from student.tracking.progress_lines import StepLines
from student.tracking.trackers import LOG, TIMING, JsonLines, TensorBoard, Tracker, open_trackers
from student.training_job import TrainingJob


class Journal:
    """Opened at the step that a training starts or goes on from; what was noted after it is cut off."""

    def __init__(
        self,
        job: TrainingJob,
        steps: int,
        first_step: int,
        device: torch.device,
        say: Callable[[str], None],
        line_every_s: float,
    ) -> None:
        store = job.store
        self._steps, self._device = steps, device
        self._log, self._timing = (JsonLines(store, name, first_step) for name in (LOG, TIMING))
        self._tensorboard = TensorBoard(store, first_step)
        extras = open_trackers(job.recipe.training.trackers, store, f"{job.recipe.name}/{job.title}")
        self._trackers: list[Tracker] = [self._tensorboard, *extras]
        self._lines = StepLines(job.title, steps, first_step, say, line_every_s)
        self._last_s = time.monotonic()

    def write(self, loaded: LoadedStep, result: StepResult, shown: Mapping[str, float], tokens: int) -> None:
        """Note a step. `shown`: the parts that count and the learning rate; `tokens`: all tokens up to now."""
        step = loaded.step.number + 1
        log = {"step": step, "steps": self._steps, "epoch": loaded.step.epoch, "tokens": tokens, "loss": result.loss}
        log |= {**shown, "gradient_norm": result.gradient_norm}
        timing = {"step": step, **self._timed(loaded, result)}
        self._log.write(log)
        self._timing.write(timing)
        for tracker in self._trackers:
            tracker.log(step, {**log, **timing})
        self._lines.show(log, timing)

    def contents(self) -> dict[str, bytes]:
        """The files that must stand before a checkpoint does; nothing where they are appended to in place."""
        lines = {file.name: file.content() for file in (self._log, self._timing) if not file.in_place}
        return lines | self._tensorboard.contents()

    def close(self) -> None:
        """Make sure that everything is kept."""
        self._log.close()
        self._timing.close()
        for tracker in self._trackers:
            tracker.close()

    def _timed(self, loaded: LoadedStep, result: StepResult) -> dict[str, Any]:
        now_s = time.monotonic()
        seconds = max(now_s - self._last_s, 1e-9)
        self._last_s = now_s
        return {
            "seconds": seconds,
            "tokens_per_s": result.tokens / seconds,
            "input_wait_share": min(1.0, loaded.waited_s / seconds),
            "memory_bytes": memory_bytes(self._device),
        }


def memory_bytes(device: torch.device) -> int:
    """What this process holds now on a CPU, or held at most on its GPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resident_bytes()


def resident_bytes() -> int:
    """What this process holds now in the machine's memory."""
    return int(psutil.Process().memory_info().rss)
