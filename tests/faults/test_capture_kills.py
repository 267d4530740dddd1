"""SIGKILL to replicas and to the driver at seeded times: the same rows, the same manifest, byte for byte.

A kill counts only if the signal arrived: the process was alive, the cache unfinished, and the process is
dead afterwards.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from actors.engines import open_engine
from pipeline.cache.commit import commit_unit, committed_units
from pipeline.cache.description import write_teacher
from pipeline.cache.format.schema import ShardSpec
from pipeline.cache.format.shard_writer import encode_shard
from pipeline.cache.lm_head import write_lm_head
from pipeline.cache.manifest import write_manifest
from pipeline.cache.storage.layout import MANIFEST_JSON
from pipeline.cache.storage.store import Store
from pipeline.cache.unit_list import UnitList
from pipeline.cache.verify.verify_cache import verify_cache
from pipeline.config import recipe_from_dict
from pipeline.contracts import ScoredSequence
from pipeline.corpus.prepare import prepare_cache
from pipeline.errors import ExitCode

ACTORS = 4
UNIT_ROWS = 8
OPTIONS = {"vocabulary": 300}


def write_job(folder: Path, storage: str, rows: int) -> Path:
    text = folder / "text.jsonl"
    draw = random.Random(11)
    text.write_text(
        "".join(json.dumps({"id": f"d{i}", "text": f"{draw.random()} row {i}"}) + "\n" for i in range(rows))
    )
    recipe = recipe_from_dict(
        {
            "name": "kills",
            "storage": str(folder / storage),
            "cluster": {"cpus": ACTORS},
            "corpus": {"source": str(text), "sequence_length": 64, "held_out": 0.1},
            "teachers": [
                {
                    "name": "a",
                    "model": "dummy",
                    "engine": "dummy",
                    "replicas": ACTORS,
                    "placement": {"cpus": 1.0},
                    "options": {**OPTIONS, "delay_s_per_token": 0.001},
                }
            ],
            "capture": {"k": 4, "unit_sequences": UNIT_ROWS},
        }
    )
    job = folder / f"{storage}.json"
    job.write_text(json.dumps({"recipe": recipe.to_dict(), "teacher": None}))
    return job


def cache_of(job: Path) -> Store:
    return Store.open(recipe_from_dict(json.loads(job.read_text())["recipe"]).cache_uri("a"))


def capture_without_ray(job: Path) -> bytes:
    """The expected result: one loop, one engine. Returns the manifest."""
    recipe = recipe_from_dict(json.loads(job.read_text())["recipe"])
    recipe = recipe.model_copy(update={"teachers": (recipe.teachers[0].model_copy(update={"options": OPTIONS}),)})
    spec, cache = recipe.capture.spec(recipe.seed), prepare_cache(recipe, recipe.teachers[0])
    engine, units = open_engine(recipe.teachers[0], None, spec), UnitList.open(cache.store)
    shard = ShardSpec.of(spec, engine.describe())
    write_teacher(cache.store, engine.describe(), shard)
    if (head := engine.lm_head()) is not None:
        write_lm_head(cache.store, head)
    for unit_id in cache.unit_ids:
        unit = units.read(unit_id)
        rows = [ScoredSequence(*pair) for pair in zip(unit.sequences, engine.score(unit.sequences), strict=True)]
        commit_unit(cache.store, unit_id, encode_shard(rows, shard), rows)
    return write_manifest(cache.store).to_bytes()


def start(job: Path) -> "subprocess.Popen[bytes]":
    log = job.with_suffix(".log").open("ab")
    return subprocess.Popen([sys.executable, "-m", "actors.capture", str(job)], stdout=log, stderr=log)


def replicas_of(driver: int) -> list[psutil.Process]:
    """The driver's replicas: Ray titles a worker by the actor that it hosts."""
    try:
        children = psutil.Process(driver).children(recursive=True)
    except psutil.Error:
        return []
    return [process for process in children if title_of(process).startswith("ray::TeacherActor")]


def title_of(process: psutil.Process) -> str:
    """The title that Ray gives a worker, read once: the process may exit between two reads, and then has none."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill(process: psutil.Process) -> bool:
    """Whether a live process was killed by this very signal."""
    try:
        alive = process.status() != psutil.STATUS_ZOMBIE
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
    except (psutil.Error, ProcessLookupError):
        return False
    return alive


@dataclass
class Killer:
    """Kills processes at seeded numbers of commits, spread evenly over the run."""

    job: Path
    units: int
    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)

    def run(self, actor_kills: int, driver_kills: int, limit_s: float) -> int:
        """Run the job until it ends by itself; its exit code."""
        draw = random.Random(self.seed)
        victims = ["actor"] * actor_kills + ["driver"] * driver_kills
        draw.shuffle(victims)
        commit_counts = sorted(draw.sample(range(1, self.units * 9 // 10), len(victims)))
        plan = list(zip(commit_counts, victims, strict=True))
        store, ends_s = cache_of(self.job), time.monotonic() + limit_s
        driver = start(self.job)
        try:
            while time.monotonic() < ends_s:
                if driver.poll() is not None:
                    return driver.returncode
                done = len(committed_units(store)) if store.exists("cache.json") else 0
                due = bool(plan) and done >= plan[0][0] and self.kill_one(plan[0][1], driver, draw)
                if due and plan.pop(0)[1] == "driver":
                    driver = start(self.job)
                time.sleep(0.01)
            raise AssertionError(f"not done after {limit_s} s: {self.job.with_suffix('.log').read_text()[-2000:]}")
        finally:
            replicas = replicas_of(driver.pid)
            driver.kill()
            driver.wait()
            for replica in replicas:
                kill(replica)

    def kill_one(self, victim: str, driver: "subprocess.Popen[bytes]", draw: random.Random) -> bool:
        replicas = replicas_of(driver.pid)
        busy = [process for process in replicas if victim == "driver" or "capture" in title_of(process)]
        if not busy:
            return False
        unfinished = len(committed_units(cache_of(self.job))) < self.units
        if victim == "driver":
            driver.send_signal(signal.SIGKILL)
            killed = driver.wait(10) == -signal.SIGKILL
            _, left = psutil.wait_procs(replicas, timeout=60)
            assert not left, f"the driver's death left replicas behind: {left}"
        else:
            target = draw.choice(busy)
            title = title_of(target)
            killed = bool(title) and kill(target)
            self.phases[title.partition(" ")[0].removeprefix("ray::")] += killed
        self.kills[victim] += killed and unfinished
        return killed


def check(tmp_path: Path, rows: int, actor_kills: int, driver_kills: int, limit_s: float) -> None:
    expected = capture_without_ray(write_job(tmp_path, "plain", rows))
    units = len(json.loads(expected)["commits"])

    job = write_job(tmp_path, "killed", rows)
    killer = Killer(job, units, seed=7)
    assert killer.run(actor_kills, driver_kills, limit_s) == 0, job.with_suffix(".log").read_text()[-2000:]

    print(f"killed {dict(killer.kills)}, replicas were in {dict(killer.phases)}")
    assert killer.kills == {"actor": actor_kills, "driver": driver_kills}
    assert killer.phases.total() == actor_kills
    assert killer.phases["TeacherActor.capture"] >= actor_kills // 2  # a title may lapse between two calls
    assert cache_of(job).read(MANIFEST_JSON) == expected
    assert json.loads(expected)["rows"] == rows
    report = verify_cache(cache_of(job))
    assert report.exit_code is ExitCode.DONE, str(report)
    assert report.rows == rows
    named = {commit["file"] for commit in json.loads(expected)["commits"]}
    assert named <= set(cache_of(job).list("data"))


@pytest.mark.slow
def test_kills_of_replicas_and_driver_change_no_byte(tmp_path):
    check(tmp_path, rows=200, actor_kills=3, driver_kills=1, limit_s=200)


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_fifty_replica_and_twenty_driver_kills_change_no_byte(tmp_path):
    check(tmp_path, rows=2000, actor_kills=50, driver_kills=20, limit_s=1500)
