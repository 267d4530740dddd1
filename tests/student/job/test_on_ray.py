"""What surrounds Ray Train's attempts; that workers train is tested where they are started."""

import pytest
import ray.train

from pipeline.errors import TrainingError
from student.checkpoint import Snapshot, save_checkpoint
from student.job import Told
from student.on_ray import forget_records, until_done


@pytest.fixture
def told(small_run):
    return Told(small_run.recipe(), "student")


def test_a_cut_off_record_of_rays_is_said_in_one_line_and_all_of_them_go(told):
    told.store.put("ray/old/checkpoint_manager_snapshot.json", b'{"checkpoint_')
    told.store.put("ray/older/checkpoint_manager_snapshot.json", b"{}")
    said = []
    forget_records(told, said.append)
    (line,) = said
    assert line.startswith(f"student: {told.store.uri}/ray/old/checkpoint_manager_snapshot.json: ")
    assert "cut off" in line
    assert not (told.store.local_path() / "ray").exists()


class Dying:
    """Workers that die in every attempt, some after a checkpoint; those that are left over come to an end."""

    def __init__(self, told, checkpoint_in):
        self.told, self.checkpoint_in, self.attempts = told, checkpoint_in, 0

    def __call__(self):
        self.attempts += 1
        if self.attempts in self.checkpoint_in:
            save_checkpoint(self.told.store, Snapshot(self.attempts, {}, {"model": {}}))
        if self.attempts < 7:
            raise ray.train.WorkerGroupError("rank 0 died", {})


def test_attempts_are_counted_anew_with_every_new_checkpoint(told):
    said, dying = [], Dying(told, checkpoint_in=(2, 4, 6))
    until_done(dying, told, said.append)
    assert dying.attempts == 7
    assert [line.split(": ")[1].split(" ended")[0] for line in said] == [
        f"attempt {n} of 3" for n in (1, 1, 2, 1, 2, 1)
    ]


def test_three_attempts_without_a_new_checkpoint_are_enough(told):
    dying = Dying(told, checkpoint_in=(2,))
    with pytest.raises(TrainingError, match="3 attempts ended early"):
        until_done(dying, told, lambda _: None)
    assert dying.attempts == 4
