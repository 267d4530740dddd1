"""Operations of a store on a local folder and on fsspec's memory file system."""

import errno
import pickle
import resource
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.cache.storage.store import Store
from pipeline.errors import StorageError


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store.open(tmp_path / "store" if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def test_a_file_can_be_put_read_listed_measured_and_deleted(store):
    store.put("data/a.bin", b"one")
    store.put("data/a.bin", b"other")
    store.put("b.json", b"{}")
    assert store.read("data/a.bin") == b"other"
    assert store.list() == ["b.json", "data/a.bin"]
    assert store.list("data") == ["data/a.bin"]
    assert store.size("data/a.bin") == 5
    assert store.modified_s("b.json") > 1e9
    store.delete("data/a.bin")
    store.delete("data/a.bin")
    assert not store.exists("data/a.bin")
    assert store.list("data") == []


def test_an_empty_store_lists_nothing(store):
    assert store.list() == []
    assert store.list("commits") == []
    assert store.temporary_files() == []
    assert store.read_if_present("cache.json") is None


def test_put_if_absent_does_not_replace_other_content(store):
    assert store.put_if_absent("commits/u.json", b"first")
    assert not store.put_if_absent("commits/u.json", b"second")
    assert store.put_if_absent("commits/u.json", b"first"), "a repeated attempt with equal content has succeeded"
    assert store.read("commits/u.json") == b"first"


def test_a_missing_file_is_an_error_of_one_line_with_its_path(store):
    with pytest.raises(StorageError, match=r"cannot read .*absent\.json: ") as caught:
        store.read("absent.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "a/../../x",
        "/etc/passwd",
        "a//b",
        "",
        ".",
        "a/.",
        "C:\\x",
        "a b",
        "x" * 129,
        "a\0b",
        "s3://b/k",
        "ä",
        "a/",
    ],
)
def test_invalid_paths_are_refused(store, path):
    for act in (store.read, store.exists, store.delete, store.size, store.child):
        with pytest.raises(StorageError):
            act(path)
    for write in (store.put, store.put_if_absent):
        with pytest.raises(StorageError):
            write(path, b"x")
    assert store.list() == []


def test_only_one_of_many_threads_creates(tmp_path):
    store = Store.open(tmp_path)
    with ThreadPoolExecutor(16) as pool:
        created = list(pool.map(lambda number: store.put_if_absent("commits/u.json", b"%d" % number), range(16)))
    assert created.count(True) == 1
    assert store.read("commits/u.json") == b"%d" % created.index(True)
    assert store.temporary_files() == []


def test_a_symbolic_link_out_of_the_store_is_refused(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"s")
    root = tmp_path / "store"
    root.mkdir()
    (root / "data").symlink_to(outside)
    store = Store.open(root)
    for act in (
        lambda: store.read("data/secret"),
        lambda: store.put("data/x", b"x"),
        lambda: store.delete("data/secret"),
    ):
        with pytest.raises(StorageError, match="link points outside"):
            act()
    assert [path.name for path in outside.iterdir()] == ["secret"]


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path):
    store = Store.open(tmp_path)
    store.put("data/a.bin", b"old")

    def die() -> None:
        raise OSError(errno.EIO, "the disk is gone")

    with pytest.raises(StorageError, match=r"errno 5 EIO"):
        store.put("data/a.bin", b"newer", midway=die)
    assert store.read("data/a.bin") == b"old"
    assert store.list() == ["data/a.bin"]
    assert store.temporary_files() == []


def test_a_file_size_limit_is_an_error_that_names_errno_and_path(tmp_path):
    store = Store.open(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        for write in (store.put, store.put_if_absent):
            with pytest.raises(StorageError, match=rf"{tmp_path}/data/a.bin: .*errno {errno.EFBIG} EFBIG"):
                write("data/a.bin", b"x" * 4096)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.list() == []
    assert store.temporary_files() == []


def test_a_file_instead_of_a_folder_is_reported(tmp_path):
    (tmp_path / "store").write_bytes(b"a file")
    store = Store.open(tmp_path / "store")
    for act in (lambda: store.put("a", b"x"), lambda: store.put_if_absent("commits/a", b"x")):
        with pytest.raises(StorageError, match="ENOTDIR"):
            act()


def test_an_unreadable_folder_is_an_error_and_not_an_empty_store(tmp_path):
    (tmp_path / "commits").write_bytes(b"a file")
    with pytest.raises(StorageError, match="cannot list"):
        Store.open(tmp_path).list("commits")


def test_relative_uris_become_absolute_and_can_be_pickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store.open("runs/one")
    store.put("a", b"x")
    monkeypatch.chdir("/")
    again = pickle.loads(pickle.dumps(store))
    assert again == store
    assert again.read("a") == b"x"
    assert store.local_path() == tmp_path / "runs" / "one"
    assert store.child("caches/t").uri == f"{tmp_path}/runs/one/caches/t"
    assert Store.open(f"file://{tmp_path}/runs/one").read("a") == b"x"


def test_no_listing_shows_a_file_that_is_being_written(tmp_path):
    store = Store.open(tmp_path)
    seen = []
    store.put("data/a.bin", b"content", midway=lambda: seen.append((store.list(), store.temporary_files())))
    (names, temporary) = seen[0]
    assert names == []
    assert len(temporary) == 1
    with pytest.raises(StorageError, match="being written"):
        store.put(temporary[0], b"x")


def test_read_many_keeps_the_order_of_its_paths(store):
    for number in range(40):
        store.put(f"commits/{number}", b"%d" % number)
    assert store.read_many([f"commits/{number}" for number in (7, 39, 0)]) == [b"7", b"39", b"0"]


def test_an_unknown_protocol_and_a_missing_package_are_reported_with_a_fix(monkeypatch):
    with pytest.raises(StorageError, match="expected a path or a URI that fsspec knows"):
        Store.open("nonsense://bucket/x")
    import fsspec

    def refuse(*args: object, **kwargs: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", refuse)
    with pytest.raises(StorageError, match=r"pip install 'stillhouse\[s3\]'"):
        Store.open("s3://bucket/x")


def test_put_creates_missing_folders(tmp_path):
    store = Store.open(tmp_path / "a" / "b")
    store.put("c/d/e", b"x")
    assert Path(tmp_path, "a/b/c/d/e").read_bytes() == b"x"
    assert [path.name for path in (tmp_path / "a/b/c/d").iterdir()] == ["e"]


def test_a_local_store_imports_no_client_of_an_object_store(tmp_path):
    script = (
        f"import sys\nfrom pipeline.cache.storage.store import Store\nStore.open({str(tmp_path)!r}).put('a', b'x')\n"
        "print([name for name in ('fsspec', 'tenacity', 'botocore') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
