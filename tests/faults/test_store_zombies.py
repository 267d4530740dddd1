"""A writer that is stopped (SIGSTOP) and continues after another one has committed its unit."""

import os
import signal

import pytest

from pipeline.cache.commit import commit_unit, read_commit, read_commits
from pipeline.cache.format.shard_writer import encode_shard

UNIT = "train-00001"


@pytest.mark.parametrize("equal", [True, False], ids=["equal bytes", "other bytes"])
@pytest.mark.parametrize("point", ["before_write", "mid_write", "after_write", "before_commit", "after_commit"])
def test_a_writer_that_continues_late_leaves_one_committed_file(capture_of, checks, tmp_path, point, equal):
    capture = capture_of(3, 4)
    store = capture.prepare(tmp_path)
    stopped = capture.start(store, fault=f"{point}:{UNIT}:stop")
    _, status = os.waitpid(stopped.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    rows = capture.rows[UNIT]
    data = encode_shard(rows, capture.made.spec, row_group_bytes=10**6 if equal else 100)
    other = commit_unit(store, UNIT, data, rows)
    os.kill(stopped.pid, signal.SIGCONT)
    stopped.join()
    assert stopped.exitcode == 0, "the loser of a race is no error"
    assert other.won == (equal or point != "after_commit")
    winner = read_commit(store, UNIT)
    assert [path for path in store.list("data") if UNIT in path] == [winner.file]
    assert winner.file == other.file
    assert store.temporary_files() == []
    checks.check_whole(store, capture, store.read("manifest.json"))


def test_a_writer_that_continues_before_its_manifest_keeps_the_newer_one(capture_of, checks, tmp_path):
    capture, fewer = capture_of(3, 4), capture_of(2, 4)
    store = capture.prepare(tmp_path)
    stopped = fewer.start(store, fault="before_manifest:*:stop")
    _, status = os.waitpid(stopped.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    capture.run(store)
    newer = store.read("manifest.json")
    assert len(read_commits(store)) == 3, (
        "the stopped writer has derived a manifest of two units, and all three are committed"
    )
    while not has_exited(stopped):
        os.kill(stopped.pid, signal.SIGCONT)  # it stops again before it puts the manifest that it derives a second time
    assert stopped.exitcode == 0
    checks.check_whole(store, capture, newer)


def has_exited(writer) -> bool:
    writer.join(0.05)
    return writer.exitcode is not None
