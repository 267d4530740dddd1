"""What surrounds Ray Train's attempts; that workers train is tested where they are started."""

import pytest
import ray.train

from pipeline.errors import TrainingError
from student.loop.checkpoint import Snapshot, save_checkpoint
from student.loop.ray_trainer import forget_records, until_done
from student.training_job import TrainingJob


@pytest.fixture
def job(small_run):
    return TrainingJob(small_run.recipe(), "student")


def test_a_cut_off_record_of_rays_is_said_in_one_line_and_all_of_them_go(job):
    job.store.put("ray/old/checkpoint_manager_snapshot.json", b'{"checkpoint_')
    job.store.put("ray/older/checkpoint_manager_snapshot.json", b"{}")
    said = []
    forget_records(job, said.append)
    (line,) = said
    assert line.startswith(f"student: {job.store.uri}/ray/old/checkpoint_manager_snapshot.json: ")
    assert "cut off" in line
    assert not (job.store.local_path() / "ray").exists()


class Dying:
    """Workers that die in every attempt, some after a checkpoint; those that are left over come to an end."""

    def __init__(self, job, checkpoint_in):
        self.job, self.checkpoint_in, self.attempts = job, checkpoint_in, 0

    def __call__(self):
        self.attempts += 1
        if self.attempts in self.checkpoint_in:
            save_checkpoint(self.job.store, Snapshot(self.attempts, {}, {"model": {}}))
        if self.attempts < 7:
            raise ray.train.WorkerGroupError("rank 0 died", {})


def test_attempts_are_counted_anew_with_every_new_checkpoint(job):
    said, dying = [], Dying(job, checkpoint_in=(2, 4, 6))
    until_done(dying, job, said.append)
    assert dying.attempts == 7
    assert [line.split(": ")[1].split(" ended")[0] for line in said] == [
        f"attempt {n} of 3" for n in (1, 1, 2, 1, 2, 1)
    ]


def test_three_attempts_without_a_new_checkpoint_are_enough(job):
    dying = Dying(job, checkpoint_in=(2,))
    with pytest.raises(TrainingError, match="3 attempts ended early"):
        until_done(dying, job, lambda _: None)
    assert dying.attempts == 4
