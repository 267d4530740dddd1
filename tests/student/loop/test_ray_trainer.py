"""Retries and records of Ray Train, without workers; test_train_kills.py starts real ones."""

import pytest
import ray.train

from pipeline.errors import TrainingError
from student.loop.checkpoint import Snapshot, save_checkpoint
from student.loop.ray_trainer import delete_ray_records, fit_with_retries
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
