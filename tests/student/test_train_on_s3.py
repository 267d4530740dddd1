"""A training whose cache, checkpoints and weights are on S3 (moto's server)."""

import signal
import uuid

import pytest
import s3fs
from moto.server import ThreadedMotoServer

from pipeline.cache.storage.store import Store
from student.loop.ray_trainer import _filesystem
from student.train import train
from student.training_job import TrainingJob


@pytest.fixture(scope="module")
def bucket():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.get_host_and_port()[1]}")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdirs("students")
        yield "s3://students"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def job(small_run, bucket):
    values = small_run.values(max_steps=7)
    uri = f"{bucket}/{uuid.uuid4().hex}"
    store, cache = Store.open(uri), Store.open(small_run.recipe().cache_uri("dummy"))
    for path in cache.list():
        store.put(f"caches/dummy/{path}", cache.read(path))
    return TrainingJob.from_json({"recipe": values | {"storage": uri}, "student": "student"})


@pytest.mark.slow
def test_a_training_on_s3_that_is_killed_resumes_to_the_same_bits(job, start, small_run, capsys):
    local = TrainingJob(small_run.recipe(max_steps=7), "student")
    train(local)
    assert start(job, f"before_marker:6:0:{small_run.folder / 'flag'}") == -signal.SIGKILL
    assert (small_run.folder / "flag").exists()
    assert job.store.list("tensorboard")
    capsys.readouterr()
    train(job)
    printed = capsys.readouterr().err
    assert "step-00000006: incomplete (no whole.json); skipped" in printed
    assert "student: resumes after step 3" in printed
    for path in ("final/model.safetensors", "log.jsonl"):
        assert job.store.read(path) == local.store.read(path), path
    assert job.store.list("checkpoints") == []


def test_ray_records_are_written_to_the_store_on_s3(bucket):
    store = Store.open(f"{bucket}/{uuid.uuid4().hex}")
    filesystem, path = _filesystem(store)
    filesystem.create_dir(f"{path}/attempt", recursive=True)
    with filesystem.open_output_stream(f"{path}/attempt/snapshot.json") as file:
        file.write(b"{}")
    assert store.list("ray") == ["ray/attempt/snapshot.json"]
