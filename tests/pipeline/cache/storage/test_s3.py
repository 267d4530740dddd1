"""A cache on S3 (moto's server) behind a proxy that injects errors, lost responses and delays."""

import contextlib
import http.client
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec.config
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from pipeline.cache.commit import commit_unit, read_commit
from pipeline.cache.description import write_cache_identity, write_teacher
from pipeline.cache.format.shard_writer import encode_shard
from pipeline.cache.gc import collect_garbage
from pipeline.cache.manifest import write_manifest
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage import fault_points, remote
from pipeline.cache.storage.store import Store
from pipeline.cache.unit_list import write_units
from pipeline.errors import StorageError

ERROR = "<Error><Code>{}</Code><Message>{}</Message></Error>"
ERRORS = {
    "503": (503, ERROR.format("ServiceUnavailable", "Please try again.")),
    "slow down": (503, ERROR.format("SlowDown", "Please reduce your request rate.")),
    "403": (403, ERROR.format("AccessDenied", "Access Denied")),
    "500": (500, ERROR.format("InternalError", "We encountered an internal error.")),
}


class Proxy(ThreadingHTTPServer):
    """Proxy of moto. `fault(method, path)` returns the fault of a request, or None to forward it."""

    def __init__(self, moto_port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.moto_port = moto_port
        self.reset()

    def reset(self) -> None:
        self.fault: Callable[[str, str], str | None] = lambda method, path: None
        self.seen: list[tuple[str, str]] = []

    def fail_first(self, count: int, fault: str, method: str = "PUT") -> None:
        """Set the fault of the first `count` requests of a method."""
        left = [count]

        def next_fault(verb: str, _: str) -> str | None:
            if verb != method or left[0] == 0:
                return None
            left[0] -= 1
            return fault

        self.fault = next_fault

    def count(self, method: str) -> int:
        return sum(verb == method for verb, _ in self.seen)

    def handle_error(self, request, client_address) -> None:
        """Ignore clients that disconnect, as some tests make them do."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _serve(self) -> None:
        body = self._body()
        self.server.seen.append((self.command, self.path))
        fault = self.server.fault(self.command, self.path)
        if fault in ERRORS:
            status, text = ERRORS[fault]
            self._respond(status, [("Content-Type", "application/xml")], text.encode())
            return
        status, headers, data = self._forward(body)
        if fault == "lose the response":
            self.close_connection = True
        elif fault == "hang":
            time.sleep(3.0)
            self.close_connection = True
        else:
            self._respond(status, headers, data)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _serve

    def _body(self) -> bytes:
        if self.headers.get("Expect") == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.server.moto_port)) as upstream:
            headers = {name: value for name, value in self.headers.items() if name != "Expect"}
            upstream.request(self.command, self.path, body, headers)
            response = upstream.getresponse()
            return response.status, response.getheaders(), response.read()

    def _respond(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = next((v for n, v in headers if n.lower() == "content-length"), str(len(data)))
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture(scope="module")
def server():
    """The proxy, a bucket behind it, and clients with short timeouts; shared, since creating a client is slow."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    proxy = Proxy(moto.get_host_and_port()[1])
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    short_timeouts = {"read_timeout": 0.6, "connect_timeout": 2, "retries": {"max_attempts": 0}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setitem(fsspec.config.conf, "s3", {"config_kwargs": short_timeouts})
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        patch.setattr(remote, "MAX_WAIT_S", 0.01)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem(config_kwargs={}).mkdirs("bucket")  # the first request is slow: without short timeouts
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()
    proxy.shutdown()
    moto.stop()


@pytest.fixture
def proxy(server):
    server.reset()
    return server


@pytest.fixture
def store(proxy, tmp_path):
    return Store.open(f"s3://bucket/{tmp_path.name}")


def test_files_are_put_read_listed_and_deleted(store):
    assert store.list() == []
    store.put("data/a", b"one")
    store.put("data/a", b"other")
    assert (store.read("data/a"), store.size("data/a"), store.exists("data/a")) == (b"other", 5, True)
    assert store.put_if_absent("commits/u", b"first")
    assert store.put_if_absent("commits/u", b"first")
    assert not store.put_if_absent("commits/u", b"second")
    assert store.list() == ["commits/u", "data/a"]
    assert store.list("data") == ["data/a"]
    assert time.time() - store.modified_s("data/a") < 60
    store.delete("data/a")
    store.delete("data/a")
    assert not store.exists("data/a")
    assert not store.exists("data")
    assert store.read_if_present("data/a") is None
    assert store.local_path() is None


def test_only_one_of_many_threads_creates(store):
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda number: store.put_if_absent("commits/u", b"%d" % number), range(8)))
    assert created.count(True) == 1


def test_a_cache_is_captured_read_and_cleaned_on_s3(store, made_up, proxy):
    made = made_up()
    units = [made.unit(number) for number in range(3)]
    write_cache_identity(store, {"of": "made-up"})
    write_units(store, units)
    write_teacher(store, made.teacher, made.spec)
    for unit in units:
        rows = made.rows(unit)
        proxy.seen.clear()
        assert commit_unit(store, unit.unit_id, encode_shard(rows, made.spec), rows).won
        assert proxy.count("PUT") == 2, "one for the shard, one for the commit"
        assert not commit_unit(store, unit.unit_id, encode_shard(rows[1:], made.spec), rows[1:]).won
    write_manifest(store)
    store.put("data/train-00000-0123456789abcdef.parquet", b"orphan")
    assert len(collect_garbage(store, grace_s=0.0).removed) == 1
    assert collect_garbage(store).too_young == ()
    assert len(list(CacheReader.open(store.uri).rows())) == 12


@pytest.mark.parametrize("act", ["put", "put_if_absent"])
def test_a_large_file_is_written_by_one_put(store, proxy, monkeypatch, act):
    monkeypatch.setattr(s3fs.S3FileSystem._pipe_file, "__defaults__", (1000, None, "overwrite"))
    proxy.seen.clear()
    getattr(store, act)("data/large", bytes(5000))
    assert (proxy.count("PUT"), proxy.count("POST")) == (1, 0), (
        "by default s3fs uploads more than twice its chunk size in parts"
    )
    assert store.size("data/large") == 5000


@pytest.mark.parametrize("fault", ["503", "slow down", "500"])
@pytest.mark.parametrize("act", ["put", "put_if_absent", "read"])
def test_a_transient_error_is_retried(store, proxy, fault, act):
    store.put("existing", b"x")
    proxy.fail_first(2, fault, "GET" if act == "read" else "PUT")
    if act == "read":
        assert store.read("existing") == b"x"
    else:
        getattr(store, act)("a", b"content")
        assert store.read("a") == b"content"


def test_an_error_that_outlasts_the_retries_names_status_and_path(store, proxy):
    proxy.fault = lambda method, path: "503"
    with pytest.raises(
        StorageError, match=rf"cannot write {store.uri}/a: Please try again. \(status 503, errno 16 EBUSY\)"
    ):
        store.put("a", b"content")
    assert proxy.count("PUT") == remote.ATTEMPTS


def test_a_permission_error_is_not_retried(store, proxy):
    store.put("existing", b"x")
    proxy.seen.clear()
    proxy.fault = lambda method, path: "403"
    for act in (
        lambda: store.put("a", b"x"),
        lambda: store.put_if_absent("a", b"x"),
        lambda: store.read("existing"),
        lambda: store.read_if_present("existing"),
        lambda: store.exists("existing"),
        lambda: store.list(),
        lambda: store.delete("existing"),
    ):
        with pytest.raises(StorageError, match=rf"cannot \w+.* {store.uri}/.*status 403") as caught:
            act()
        assert "\n" not in str(caught.value)
    assert proxy.count("PUT") == 2


@pytest.mark.parametrize("fault", ["lose the response", "hang"])
def test_a_put_whose_response_is_lost_has_succeeded(store, proxy, fault):
    proxy.fail_first(1, fault)
    store.put("a", b"content")
    proxy.fail_first(1, fault)
    assert store.put_if_absent("b", b"content"), "this caller's content was stored"
    proxy.fail_first(1, fault)
    assert not store.put_if_absent("b", b"another")
    assert (store.read("a"), store.read("b")) == (b"content", b"content")


def test_a_put_has_succeeded_even_if_every_response_is_lost(store, proxy):
    proxy.fail_first(100, "lose the response")
    store.put("a", b"content")
    assert store.put_if_absent("b", b"content")
    assert not store.put_if_absent("b", b"another")
    proxy.fault = lambda method, path: "lose the response"
    with pytest.raises(StorageError, match=rf"cannot write {store.uri}/c: "):
        store.put("c", b"content")


@pytest.mark.parametrize("lost", [1, 2], ids=["the shard's response", "the commit's response"])
def test_a_commit_whose_response_is_lost_is_stored_once(store, proxy, made_up, lost):
    made = made_up()
    rows = made.rows(made.unit(0))
    write_cache_identity(store, {"of": "made-up"})
    puts = iter(range(1, 100))
    proxy.fault = lambda method, path: "lose the response" if method == "PUT" and next(puts) == lost else None
    commit = commit_unit(store, "train-00000", encode_shard(rows, made.spec), rows)
    assert commit.won
    assert read_commit(store, "train-00000") == commit
    assert store.list("data") == [commit.file]


def test_a_missing_bucket_is_reported(proxy):
    with pytest.raises(StorageError, match=r"s3://nowhere/x/a: .*bucket does not exist"):
        Store.open("s3://nowhere/x").put("a", b"x")


def test_missing_credentials_are_reported(proxy, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match=r"(?i)credentials"):
        Store.open("s3://bucket/x").put("a", b"x")
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("point", [point for point in fault_points.POINTS if point != "before_manifest"])
def test_a_writer_killed_on_s3_can_be_repeated(store, made_up, monkeypatch, point):
    made = made_up()
    rows = made.rows(made.unit(0))
    data = encode_shard(rows, made.spec)
    write_cache_identity(store, {"of": "made-up"})
    monkeypatch.setenv(fault_points.ENVIRONMENT_KEY, f"{point}:train-00000:kill")
    process = multiprocessing.get_context("fork").Process(target=commit_unit, args=(store, "train-00000", data, rows))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (read_commit(store, "train-00000") is not None) == (point == "after_commit")
    monkeypatch.delenv(fault_points.ENVIRONMENT_KEY)
    commit = commit_unit(store, "train-00000", data, rows)
    assert commit.won
    assert store.list("data") == [commit.file]
    assert store.read(commit.file) == data


def test_a_forked_process_opens_its_own_connection(store, tmp_path):
    store.put("a", b"x")
    process = multiprocessing.get_context("fork").Process(target=lambda: store.put("b", store.read("a")))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert store.read("b") == b"x"
