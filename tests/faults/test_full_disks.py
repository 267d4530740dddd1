"""Full disk, file-size limit, read-only store: the error has errno and path, commits are kept, a rerun completes."""

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

from pipeline.cache import quarantine
from pipeline.cache.commit import commit_unit, committed_units
from pipeline.cache.description import write_cache_identity, write_teacher
from pipeline.cache.export.open_layout import export_cache
from pipeline.cache.format.shard_writer import encode_shard
from pipeline.cache.lm_head import write_lm_head
from pipeline.cache.manifest import write_manifest
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage import fault_points
from pipeline.cache.storage.layout import FAITHFULNESS_JSON, answers_path
from pipeline.cache.storage.store import Store
from pipeline.cache.unit_list import write_units
from pipeline.contracts import Document, LmHead
from pipeline.corpus.answers import write_answers
from pipeline.errors import StorageError
from pipeline.models.tokenizers import ByteTokenizer

FILES = {
    "generated/00000-": "answers",
    "units/00000.parquet": "units",
    "units/index.parquet": "units",
    "tokenizer/tokenizer.json": "tokenizer",
    "cache.json": "identity",
    "teacher.json": "teacher",
    "lm_head.safetensors": "head",
    "quarantine/s.json": "quarantine",
    "data/train-00000-": "commit",
    "commits/train-00000.json": "commit",
    "manifest.json": "manifest",
    "faithfulness.json": "verdict",
    "open/sequences/train-00000.parquet": "export",
    "open/positions/train-00000.parquet": "export",
    "open/README.md": "export",
}
"""Every kind of file that a cache or its export consists of, and the step that writes it."""
LATER_FILES = {"units/index.parquet", "open/positions/train-00000.parquet", "open/README.md"}
"""Files that a step writes after others."""
DISK_BYTES = 4 << 20
MS_RDONLY, MS_REMOUNT, MNT_DETACH = 1, 32, 2
NOBODY = 65534


@contextmanager
def size_limit(most_bytes: int) -> Iterator[None]:
    """Limit the size of files that this process writes: EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def full_disk(disk: Path) -> Iterator[None]:
    """Fill the disk to the last byte: ENOSPC."""
    ballast = disk / "ballast"
    with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        ballast.unlink()


def mount(folder: Path, flags: int = 0) -> bool:
    """Mount a small tmpfs, or remount it with other flags. False where that is not allowed."""
    options = f"size={DISK_BYTES}".encode()
    return ctypes.CDLL(None).mount(b"tmpfs", str(folder).encode(), b"tmpfs", flags, options) == 0


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A tmpfs of 4 MiB. Skips the test where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount(folder):
        pytest.skip("no tmpfs can be mounted here, so no disk can be full or read-only: run as root")
    yield folder
    ctypes.CDLL(None).umount2(str(folder).encode(), MNT_DETACH)


def steps(made) -> dict[str, Callable[[Store], object]]:
    """The steps that write a cache of one unit, in order."""
    unit = made.unit(0)
    rows = made.rows(unit)
    shard, head = encode_shard(rows, made.spec), LmHead(np.zeros((500, 16), np.uint16))
    answers = [Document("d", text="a prompt and its answer " * 10, prompt=8)]
    return {
        "answers": lambda store: write_answers(store, answers_path(0, "0" * 64), answers),
        "units": lambda store: write_units(store, [unit]),
        "tokenizer": lambda store: store.put("tokenizer/tokenizer.json", ByteTokenizer().files()["tokenizer.json"]),
        "identity": lambda store: write_cache_identity(store, {"of": "made-up", "much": "x" * 500}),
        "teacher": lambda store: write_teacher(store, made.teacher, made.spec),
        "head": lambda store: write_lm_head(store, head),
        "quarantine": lambda store: quarantine.record(store, "s", unit.unit_id, "reason", "message " * 50),
        "commit": lambda store: commit_unit(store, unit.unit_id, shard, rows),
        "manifest": write_manifest,
        "verdict": lambda store: store.put(FAITHFULNESS_JSON, b'{"usable": true, "why": "close"}' * 10),
        "export": lambda store: export_cache(store, store.child("open")),
    }


def begin_fault(file: str, fault: Callable[[], object], monkeypatch) -> Callable[[], object]:
    """Begin the fault: just before `file` where its step writes others first. Returns what ends it."""
    entered, begun = fault(), []
    if file == "commits/train-00000.json":
        monkeypatch.setattr(
            fault_points, "fault_point", lambda point, _: point == "before_commit" and entered.__enter__()
        )
    elif file in LATER_FILES:
        put = Store.put

        def put_with_fault(store: Store, path: str, data: bytes, **rest: object) -> None:
            if store.where(path).endswith(f"/{file}") and not begun:
                begun.append(entered.__enter__())
            put(store, path, data, **rest)

        monkeypatch.setattr(Store, "put", put_with_fault)
    else:
        entered.__enter__()
    return lambda: (monkeypatch.undo(), end(entered))


def check_file(made, store: Store, file: str, fault, code: int, monkeypatch) -> None:
    actions, step = steps(made), FILES[file]
    for other in list(actions)[: list(actions).index(step)]:
        actions[other](store)
    before = {path: store.read(path) for path in store.list()}
    relieve = begin_fault(file, fault, monkeypatch)
    try:
        with pytest.raises(StorageError) as caught:
            actions[step](store)
    finally:
        relieve()
    assert file in str(caught.value)
    assert f"errno {code} {errno.errorcode[code]}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert store.temporary_files() == []
    assert {path: store.read(path) for path in store.list() if path in before} == before
    for action in actions.values():
        action(store)
    assert len(list(CacheReader.open(store).rows())) == 4


@pytest.mark.parametrize("file", FILES)
def test_a_file_size_limit_at_any_file_is_named_and_a_rerun_completes(made_up, tmp_path, monkeypatch, file):
    store = Store.open(tmp_path / "cache")
    check_file(made_up(), store, file, lambda: size_limit(64), errno.EFBIG, monkeypatch)


@pytest.mark.parametrize("file", FILES)
def test_a_full_disk_at_any_file_is_named_and_a_rerun_completes(made_up, disk, monkeypatch, file):
    check_file(made_up(), Store.open(disk / "cache"), file, lambda: full_disk(disk), errno.ENOSPC, monkeypatch)


def test_a_limit_that_is_reached_during_a_capture_keeps_every_commit(capture_of, checks, tmp_path, monkeypatch):
    capture, limit = capture_of(60, 4), size_limit(64)
    undisturbed = manifest_of_undisturbed(capture, tmp_path)
    monkeypatch.setattr(fault_points, "fault_point", lambda _, unit: unit == "train-00030" and limit.__enter__())
    store = capture.prepare(tmp_path / "cache")
    check_capture_on(store, capture, checks, undisturbed, errno.EFBIG, lambda: (monkeypatch.undo(), end(limit)))


def test_a_disk_that_fills_up_during_a_capture_keeps_every_commit(capture_of, checks, tmp_path, disk, monkeypatch):
    capture = capture_of(60, 4)
    undisturbed = manifest_of_undisturbed(capture, tmp_path)
    store, ballast = capture.prepare(disk / "cache"), fill_disk(disk, free_bytes=300_000)
    ballast.__enter__()
    check_capture_on(store, capture, checks, undisturbed, errno.ENOSPC, lambda: end(ballast))


def end(fault) -> None:
    fault.__exit__(None, None, None)


def manifest_of_undisturbed(capture, folder: Path) -> bytes:
    store = capture.prepare(folder / "undisturbed")
    capture.run(store)
    return store.read("manifest.json")


def check_capture_on(store: Store, capture, checks, undisturbed: bytes, code: int, relieve) -> None:
    with pytest.raises(StorageError, match=rf"cannot .*/cache/.*errno {code} {errno.errorcode[code]}"):
        capture.run(store)
    relieve()
    done = len(committed_units(store))
    assert 0 < done < 60, f"the disk filled up too early or too late: {done} units committed"
    checks.check_commits(store, capture)
    capture.run(store)
    checks.check_whole(store, capture, undisturbed)


@contextmanager
def fill_disk(disk: Path, free_bytes: int) -> Iterator[None]:
    """Fill the disk but for `free_bytes`."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - free_bytes))
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def as_other_user() -> Iterator[None]:
    """Run as the user nobody, since root may write everywhere."""
    mine = os.geteuid()
    if mine == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(mine)


def check_read_only(made, store: Store, code: int) -> None:
    """Reads succeed, and the error of every kind of write has errno and path."""
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
        with as_other_user():
            check_read_only(made, store, errno.EACCES)
    finally:
        for folder in [place / "cache", *(path for path in (place / "cache").iterdir() if path.is_dir())]:
            folder.chmod(0o755)
        shutil.rmtree(place)


def test_a_read_only_disk_is_read_and_says_so_when_written(made_up, disk):
    made = made_up()
    store = Store.open(disk / "cache")
    for action in steps(made).values():
        action(store)
    assert mount(disk, MS_REMOUNT | MS_RDONLY)
    check_read_only(made, store, errno.EROFS)


def test_a_file_in_the_way_of_a_folder_says_so_when_written(tmp_path):
    (tmp_path / "data").write_bytes(b"")
    with pytest.raises(StorageError, match=r"errno 20 ENOTDIR"):
        Store.open(tmp_path).put("data/x", b"x")
