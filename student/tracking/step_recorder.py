"""Records of every step, written by rank 0: log.jsonl, timing.jsonl, trackers, progress."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch

from student.data.prefetch import LoadedStep
from student.loop.distiller import PARTS
from student.loop.step import StepResult
from student.tracking.progress import StepReport
from student.tracking.trackers import LOG, TIMING, JsonLines, TensorBoard, Tracker, open_trackers
from student.training_job import TrainingJob


class StepRecorder:
    """Writes every step to all records. Steps after `first_step` that an earlier attempt recorded are removed."""

    def __init__(
        self,
        job: TrainingJob,
        steps: int,
        first_step: int,
        device: torch.device,
        report: Callable[[StepReport], None],
        report_every_s: float,
    ) -> None:
        store = job.store
        self._steps, self._device = steps, device
        self._log, self._timing = (JsonLines(store, name, first_step) for name in (LOG, TIMING))
        self._tensorboard = TensorBoard(store, first_step)
        trackers = open_trackers(job.recipe.training.trackers, store, f"{job.recipe.name}/{job.title}")
        self._trackers: list[Tracker] = [self._tensorboard, *trackers]
        self._reporter = StepReporter(job.title, steps, report, report_every_s)
        self._last_s = time.monotonic()

    def write(self, loaded: LoadedStep, result: StepResult, metrics: Mapping[str, float], tokens: int) -> None:
        """Record a step. `metrics`: its losses and learning rate; `tokens`: all tokens so far."""
        step = loaded.step.number + 1
        log = {"step": step, "steps": self._steps, "epoch": loaded.step.epoch, "tokens": tokens, "loss": result.loss}
        log |= {**metrics, "gradient_norm": result.gradient_norm}
        timing = {"step": step, **self._measure_time(loaded, result)}
        self._log.write(log)
        self._timing.write(timing)
        for tracker in self._trackers:
            tracker.log(step, {**log, **timing})
        self._reporter.report(log, timing)

    def contents(self) -> dict[str, bytes]:
        """Files to upload before a checkpoint, by path; none in a local store, where they are appended to in place."""
        lines = {file.name: file.content() for file in (self._log, self._timing) if not file.in_place}
        return lines | self._tensorboard.contents()

    def close(self) -> None:
        """Flush and close all records."""
        self._log.close()
        self._timing.close()
        for tracker in self._trackers:
            tracker.close()

    def _measure_time(self, loaded: LoadedStep, result: StepResult) -> dict[str, Any]:
        now_s = time.monotonic()
        seconds = max(now_s - self._last_s, 1e-9)
        self._last_s = now_s
        return {
            "seconds": seconds,
            "tokens_per_s": result.tokens / seconds,
            "input_wait_share": min(1.0, loaded.waited_s / seconds),
            "memory_bytes": memory_bytes(self._device),
        }


class StepReporter:
    """Reports a step at most every `every_s` seconds, and always the first and the last one."""

    def __init__(self, title: str, steps: int, report: Callable[[StepReport], None], every_s: float) -> None:
        self._title, self._steps = title, steps
        self._report, self._every_s = report, every_s
        self._reported_s = float("-inf")

    def report(self, log: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Report the step if it is due."""
        now_s, step = time.monotonic(), int(log["step"])
        if now_s - self._reported_s < self._every_s and step < self._steps:
            return
        self._reported_s = now_s
        parts = " ".join(f"{name} {log[name]:.4f}" for name in PARTS if name in log)
        metrics = [
            f"loss {log['loss']:.4f} {parts}",
            f"norm {log['gradient_norm']:.2f}",
            f"{timing['tokens_per_s']:.0f} tokens/s",
            f"{timing['memory_bytes'] / 2**30:.2f} GiB",
            f"input wait {100 * timing['input_wait_share']:.1f} %",
        ]
        summary = f"loss {log['loss']:.3f}, {timing['tokens_per_s']:.0f} tokens/s"
        self._report(StepReport(self._title, step, self._steps, ", ".join(metrics), summary))


def memory_bytes(device: torch.device) -> int:
    """Peak of allocated GPU memory, or on a CPU the resident set size."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resident_bytes()


def resident_bytes() -> int:
    """Resident set size of this process."""
    return int(psutil.Process().memory_info().rss)
