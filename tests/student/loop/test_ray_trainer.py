"""Retries and records of Ray Train, without workers; test_train_kills.py starts real ones."""

import logging
from types import SimpleNamespace

import pytest
import ray.train

from pipeline.errors import TrainingError
from student.loop.checkpoint import Snapshot, save_checkpoint
from student.loop.ray_trainer import _log_to, _show_all, delete_ray_records, fit_with_retries
from student.tracking.progress import StepReport
from student.training_job import TrainingJob


@pytest.fixture
def job(small_run):
    return TrainingJob(small_run.recipe(), "student")


def test_ray_records_are_deleted_with_one_warning_for_each_truncated_one(job, caplog):
    job.store.put("ray/old/checkpoint_manager_snapshot.json", b'{"checkpoint_')
    job.store.put("ray/older/checkpoint_manager_snapshot.json", b"{}")
    delete_ray_records(job)
    (line,) = caplog.messages
    assert line.startswith(f"student: {job.store.uri}/ray/old/checkpoint_manager_snapshot.json: ")
    assert "truncated" in line
    assert not (job.store.local_path() / "ray").exists()


class DyingWorkers:
    """Workers that die in the first six attempts, in some of them after a checkpoint."""

    def __init__(self, job, checkpoint_in):
        self.job, self.checkpoint_in, self.attempts = job, checkpoint_in, 0

    def __call__(self):
        self.attempts += 1
        if self.attempts in self.checkpoint_in:
            save_checkpoint(self.job.store, Snapshot(self.attempts, {}, {"model": {}}))
        if self.attempts < 7:
            raise ray.train.WorkerGroupError("rank 0 died", {})


def test_a_new_checkpoint_resets_the_count_of_attempts(job, caplog):
    dying = DyingWorkers(job, checkpoint_in=(2, 4, 6))
    fit_with_retries(dying, job)
    assert dying.attempts == 7
    assert [line.split(": ")[1].split(" failed")[0] for line in caplog.messages] == [
        f"attempt {n} of 3" for n in (1, 1, 2, 1, 2, 1)
    ]


def test_three_attempts_without_a_new_checkpoint_raise(job):
    dying = DyingWorkers(job, checkpoint_in=(2,))
    with pytest.raises(TrainingError, match="3 attempts failed"):
        fit_with_retries(dying, job)
    assert dying.attempts == 4


@pytest.fixture
def root_logger():
    """The root logger; its handlers and the levels of this process' loggers are restored."""
    root, names = logging.getLogger(), ("", "pipeline", "actors", "student", "__main__", "ray", "vllm")
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in names}
    yield root
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


class Messages(list):
    """Stands for Ray's queue."""

    put = put_nowait = list.append

    def get(self):
        return self.pop(0)


@pytest.mark.parametrize(("rank", "expected"), [(0, ["a line", "a warning"]), (1, ["a warning"])])
def test_a_worker_forwards_our_lines_of_rank_0_and_warnings_of_all(monkeypatch, root_logger, rank, expected):
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: rank))
    messages = Messages()
    _log_to(messages)
    logging.getLogger("student.loop").info("a line")
    logging.getLogger("botocore").info("a line of another package")
    logging.getLogger("student.loop").warning("a warning")
    assert [record.getMessage() for record in messages] == expected
    assert all(record.host for record in messages)


def test_messages_are_shown_in_order_until_none(capsys):
    record = logging.makeLogRecord({"msg": "resumes", "levelno": logging.INFO, "levelname": "INFO", "name": "student"})
    _show_all(Messages([record, StepReport("student", 1, 2, "loss 2.0", ""), None]))
    assert capsys.readouterr().err.splitlines() == ["resumes", "student: 1/2 steps, unknown time left (loss 2.0)"]
