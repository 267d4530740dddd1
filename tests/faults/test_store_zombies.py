"""A writer that sleeps through its lease and wakes after another has committed its unit."""

import os
import signal

import pytest

from pipeline.cache.commit import commit_unit, read_commit, read_commits
from pipeline.cache.format.shard_writer import encode_shard

UNIT = "train-00001"


@pytest.mark.parametrize("equal", [True, False], ids=["equal bytes", "other bytes"])
@pytest.mark.parametrize("point", ["before_write", "mid_write", "after_write", "before_commit", "after_commit"])
def test_a_writer_that_wakes_late_leaves_one_committed_file(capture_of, checks, tmp_path, point, equal):
    capture = capture_of(3, 4)
    store = capture.prepare(tmp_path)
    zombie = capture.start(store, fault=f"{point}:{UNIT}:stop")
    _, status = os.waitpid(zombie.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    rows = capture.rows[UNIT]
    data = encode_shard(rows, capture.made.spec, row_group_bytes=10**6 if equal else 100)
    other = commit_unit(store, UNIT, data, rows)
    os.kill(zombie.pid, signal.SIGCONT)
    zombie.join()
    assert zombie.exitcode == 0, "the loser of a race is no error"
    assert other.won == (equal or point != "after_commit")
    standing = read_commit(store, UNIT)
    assert [path for path in store.list("data") if UNIT in path] == [standing.file]
    assert standing.file == other.file
    assert store.temporary_files() == []
    checks.check_whole(store, capture, store.read("manifest.json"))


def test_a_writer_that_wakes_before_its_manifest_leaves_the_newer_one(capture_of, checks, tmp_path):
    capture, fewer = capture_of(3, 4), capture_of(2, 4)
    store = capture.prepare(tmp_path)
    zombie = fewer.start(store, fault="before_manifest:*:stop")
    _, status = os.waitpid(zombie.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    capture.run(store)
    newer = store.read("manifest.json")
    assert len(read_commits(store)) == 3, "the zombie has derived a manifest of two units, and all three are committed"
    while not zombie_is_gone(zombie):
        os.kill(zombie.pid, signal.SIGCONT)  # it stops once more before it puts the manifest that it derived again
    assert zombie.exitcode == 0
    checks.check_whole(store, capture, newer)


def zombie_is_gone(zombie) -> bool:
    zombie.join(0.05)
    return zombie.exitcode is not None
