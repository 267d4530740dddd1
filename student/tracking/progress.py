"""Progress of a training, as rank 0 reports it and the job's process shows it."""

from dataclasses import dataclass

from pipeline.run.progress import HEARTBEAT_S, Progress


@dataclass(frozen=True, slots=True)
class StepReport:
    """One finished step, as it travels from a worker to the job's process."""

    title: str
    step: int
    steps: int
    metrics: str
    """Losses, gradient norm, throughput, memory and input wait, readable."""
    summary: str
    """Loss and throughput, for a bar."""


class StepProgress:
    """Shows reported steps: one bar per training on a terminal, otherwise a log line per report."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    @property
    def every_s(self) -> float:
        """Seconds between reports that are worth showing."""
        return 0.2 if Progress.has_terminal() else HEARTBEAT_S

    def show(self, report: StepReport) -> None:
        """Show a step."""
        if self._progress is None:
            self._progress = Progress(report.title, report.steps, report.step, unit="step")
        self._progress.update(report.step, report.steps)
        self._progress.beat(report.summary if Progress.has_terminal() else report.metrics, now=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.close()
