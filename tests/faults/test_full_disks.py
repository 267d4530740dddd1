"""A full disk, a file-size limit, a read-only store: errno and path are said, commits stay whole, a rerun completes."""

import ctypes
import errno
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pipeline.cache import faults, quarantine
from pipeline.cache.commit import commit_unit, committed_units
from pipeline.cache.description import write_cache_identity, write_teacher
from pipeline.cache.layout import FAITHFULNESS_JSON
from pipeline.cache.lm_head import write_lm_head
from pipeline.cache.manifest import write_manifest
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage import Store
from pipeline.cache.units import write_units
from pipeline.cache.writer import encode_shard
from pipeline.contracts import LmHead
from pipeline.errors import StorageError

SITES = {
    "cache.json": "identity",
    "units/00000.parquet": "units",
    "units/index.parquet": "units",
    "teacher.json": "teacher",
    "lm_head.safetensors": "head",
    "quarantine/s.json": "quarantine",
    "data/train-00000-": "commit",
    "commits/train-00000.json": "commit",
    "manifest.json": "manifest",
    "faithfulness.json": "verdict",
}
"""Every kind of file that the cache writes, and which step writes it."""
DISK_BYTES = 4 << 20
MS_RDONLY, MS_REMOUNT, MNT_DETACH = 1, 32, 2
NOBODY = 65534


@contextmanager
def size_limit(most_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond that: EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def full_disk(disk: Path) -> Iterator[None]:
    """Not a byte is left on the disk: ENOSPC."""
    ballast = disk / "ballast"
    with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        ballast.unlink()


def mount(folder: Path, flags: int = 0) -> bool:
    """Whether a small tmpfs could be mounted there (or mounted again with other flags)."""
    options = f"size={DISK_BYTES}".encode()
    return ctypes.CDLL(None).mount(b"tmpfs", str(folder).encode(), b"tmpfs", flags, options) == 0


@pytest.fixture
def disk(tmp_path) -> Iterator[Path | None]:
    """A tmpfs of 4 MiB, or None where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = mount(folder)
    yield folder if mounted else None
    if mounted:
        ctypes.CDLL(None).umount2(str(folder).encode(), MNT_DETACH)


def steps(made) -> dict[str, Callable[[Store], object]]:
    """The steps that, in this order, make a cache of one unit."""
    unit = made.unit(0)
    rows = made.rows(unit)
    shard, head = encode_shard(rows, made.spec), LmHead(np.zeros((500, 16), np.uint16))
    return {
        "identity": lambda store: write_cache_identity(store, {"of": "made-up", "much": "x" * 500}),
        "units": lambda store: write_units(store, [unit]),
        "teacher": lambda store: write_teacher(store, made.teacher, made.spec),
        "head": lambda store: write_lm_head(store, head),
        "quarantine": lambda store: quarantine.record(store, "s", unit.unit_id, "reason", "message " * 50),
        "commit": lambda store: commit_unit(store, unit.unit_id, shard, rows),
        "manifest": write_manifest,
        "verdict": lambda store: store.put(FAITHFULNESS_JSON, b'{"usable": true, "why": "close"}' * 10),
    }


def fails_at(site: str, scarcity: Callable[[], object], monkeypatch) -> Callable[[], object]:
    """The scarcity, beginning just before the site's own file where an earlier one is written by the same call."""
    entered = scarcity()
    if site == "commits/train-00000.json":
        monkeypatch.setattr(faults, "reach", lambda point, _: point == "before_commit" and entered.__enter__())
    elif site == "units/index.parquet":
        put = Store.put

        def put_then_scarce(store: Store, path: str, data: bytes, **rest: object) -> None:
            if path == site:
                entered.__enter__()
            put(store, path, data, **rest)

        monkeypatch.setattr(Store, "put", put_then_scarce)
    else:
        entered.__enter__()
    return lambda: (monkeypatch.undo(), entered.__exit__(None, None, None))


def check_site(made, store: Store, site: str, scarcity, code: int, monkeypatch) -> None:
    actions, step = steps(made), SITES[site]
    for other in list(actions)[: list(actions).index(step)]:
        actions[other](store)
    before = {path: store.read(path) for path in store.list()}
    relieve = fails_at(site, scarcity, monkeypatch)
    try:
        with pytest.raises(StorageError) as caught:
            actions[step](store)
    finally:
        relieve()
    assert site in str(caught.value)
    assert f"errno {code} {errno.errorcode[code]}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert store.leftovers() == []
    assert {path: store.read(path) for path in store.list() if path in before} == before
    for action in actions.values():
        action(store)
    assert len(list(CacheReader.open(store).rows())) == 4


@pytest.mark.parametrize("site", SITES)
def test_a_file_size_limit_at_any_write_site_is_named_and_a_rerun_completes(made_up, tmp_path, monkeypatch, site):
    store = Store.open(tmp_path / "cache")
    check_site(made_up(), store, site, lambda: size_limit(64), errno.EFBIG, monkeypatch)


@pytest.mark.parametrize("site", SITES)
def test_a_full_disk_at_any_write_site_is_named_and_a_rerun_completes(made_up, tmp_path, disk, monkeypatch, site):
    if disk is None:  # nothing may be mounted here: the nearest thing is a limit of nothing at all
        check_site(made_up(), Store.open(tmp_path / "cache"), site, lambda: size_limit(0), errno.EFBIG, monkeypatch)
    else:
        check_site(made_up(), Store.open(disk / "cache"), site, lambda: full_disk(disk), errno.ENOSPC, monkeypatch)


def test_a_disk_that_fills_up_during_a_capture_keeps_every_commit(capture_of, checks, tmp_path, disk, monkeypatch):
    capture = capture_of(60, 4)
    capture.run(capture.prepare(tmp_path / "undisturbed"))
    undisturbed = Store.open(tmp_path / "undisturbed").read("manifest.json")
    store = capture.prepare((disk or tmp_path) / "cache")
    if disk is None:  # nothing may be mounted here: from some unit on, no file may grow
        relief, code = size_limit(64), errno.EFBIG
        monkeypatch.setattr(faults, "reach", lambda _, unit: unit == "train-00030" and relief.__enter__())
    else:
        relief, code = ballast_but(disk, free_bytes=300_000), errno.ENOSPC
        relief.__enter__()
    with pytest.raises(StorageError, match=rf"cannot .*/cache/.*errno {code} {errno.errorcode[code]}"):
        capture.run(store)
    relief.__exit__(None, None, None)
    monkeypatch.undo()
    done = len(committed_units(store))
    assert 0 < done < 60, f"the disk filled up too early or too late: {done} units committed"
    checks.check_commits(store, capture)
    capture.run(store)
    checks.check_whole(store, capture, undisturbed)


@contextmanager
def ballast_but(disk: Path, free_bytes: int) -> Iterator[None]:
    """Hardly anything is left on the disk."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - free_bytes))
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write everywhere: be someone else for a while."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(mine)


def check_read_only(made, store: Store, code: int) -> None:
    """Reading goes on, every kind of write says errno and path."""
    reader = CacheReader.open(store)
    assert len(list(reader.rows())) == 4
    rows = made.rows(made.unit(1))
    for write, path in (
        (lambda: commit_unit(store, "train-00001", encode_shard(rows, made.spec), rows), "data/train-00001-"),
        (lambda: write_manifest(store), "manifest.json"),
        (lambda: quarantine.record(store, "q", "train-00000", "r", "m"), "quarantine/q.json"),
        (lambda: store.delete(reader.commit("train-00000").file), "data/train-00000-"),
    ):
        with pytest.raises(StorageError, match=rf"cannot .*{path}.*errno {code} {errno.errorcode[code]}"):
            write()


def test_a_store_without_write_permission_is_read_and_says_so_when_written(made_up):
    made, place = made_up(), Path(tempfile.mkdtemp())
    try:
        store = Store.open(place / "cache")
        for action in steps(made).values():
            action(store)
        place.chmod(0o755)
        for folder in [place / "cache", *(path for path in (place / "cache").iterdir() if path.is_dir())]:
            folder.chmod(0o555)
        with as_nobody():
            check_read_only(made, store, errno.EACCES)
    finally:
        for folder in [place / "cache", *(path for path in (place / "cache").iterdir() if path.is_dir())]:
            folder.chmod(0o755)
        shutil.rmtree(place)


def test_a_read_only_disk_is_read_and_says_so_when_written(made_up, disk, tmp_path):
    made = made_up()
    store = Store.open((disk or tmp_path) / "cache")
    for action in steps(made).values():
        action(store)
    if disk is None:  # nothing may be mounted here: a file in the way of every folder refuses writes as well
        shutil.move(tmp_path / "cache" / "data", tmp_path / "data")
        (tmp_path / "cache" / "data").write_bytes(b"")
        with pytest.raises(StorageError, match=r"errno 20 ENOTDIR"):
            store.put("data/x", b"x")
    else:
        assert mount(disk, MS_REMOUNT | MS_RDONLY)
        check_read_only(made, store, errno.EROFS)
