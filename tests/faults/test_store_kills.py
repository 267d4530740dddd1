"""SIGKILL at every named point and at random times: no row lost, none duplicated, the same manifest."""

import random
import time
from collections import Counter

import pytest
from _pytest.tmpdir import TempPathFactory

from pipeline.cache.commit import committed_units
from pipeline.cache.storage import fault_points

UNITS = 5


@pytest.fixture(scope="module")
def capture(capture_of):
    return capture_of(UNITS, 4)


@pytest.fixture(scope="module")
def undisturbed(capture, tmp_path_factory: TempPathFactory) -> bytes:
    store = capture.prepare(tmp_path_factory.mktemp("undisturbed"))
    capture.run(store)
    return store.read("manifest.json")


@pytest.mark.parametrize("unit", ["train-00000", "train-00002", "train-00004"])
@pytest.mark.parametrize("point", [point for point in fault_points.POINTS if point != "before_manifest"])
def test_a_kill_at_a_named_point_loses_nothing(capture, undisturbed, checks, tmp_path, point, unit):
    store = capture.prepare(tmp_path)
    assert checks.died_of_kill(capture.start(store, fault=f"{point}:{unit}:kill"))
    done = int(unit[-1]) + (1 if point == "after_commit" else 0)
    assert len(committed_units(store)) == done, "the process was killed at another point"
    checks.check_commits(store, capture)
    capture.run(store)
    checks.check_whole(store, capture, undisturbed)


def test_a_kill_before_the_manifest_loses_nothing(capture, undisturbed, checks, tmp_path):
    store = capture.prepare(tmp_path)
    assert checks.died_of_kill(capture.start(store, fault="before_manifest:*:kill"))
    assert len(committed_units(store)) == UNITS
    assert not store.exists("manifest.json")
    capture.run(store)
    checks.check_whole(store, capture, undisturbed)


def test_a_kill_at_every_point_in_turn_loses_nothing(capture, undisturbed, checks, tmp_path):
    store = capture.prepare(tmp_path)
    for point in fault_points.POINTS:
        assert checks.died_of_kill(capture.start(store, fault=f"{point}:*:kill")), point
        checks.check_commits(store, capture)
    capture.run(store)
    checks.check_whole(store, capture, undisturbed)


@pytest.mark.slow
def test_a_hundred_random_kills_lose_nothing(capture_of, checks, tmp_path, record_property):
    rounds_of_kills(capture_of(60, 4), checks, tmp_path, record_property, kills=100, seed=1, longest_wait_s=0.06)


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_hundred_random_kills_over_two_thousand_rows_lose_nothing(
    capture_of, checks, tmp_path, record_property, seed
):
    rounds_of_kills(capture_of(250, 8), checks, tmp_path, record_property, kills=100, seed=seed, longest_wait_s=0.06)


def rounds_of_kills(capture, checks, folder, record_property, *, kills: int, seed: int, longest_wait_s: float) -> None:
    """Fill store after store with four writers, and kill them until there were that many kills."""
    store = capture.prepare(folder / "undisturbed")
    capture.run(store)
    undisturbed = store.read("manifest.json")
    rng, histogram, number = random.Random(seed), Counter(), 0
    while histogram.total() < kills:
        store = capture.prepare(folder / f"round-{number}")
        histogram += disturbed(store, capture, checks, rng, kills - histogram.total(), longest_wait_s)
        checks.check_commits(store, capture)
        capture.run(store)
        checks.check_whole(store, capture, undisturbed)
        number += 1
    inside = sum(histogram[phase] for phase in ("encode", "put", "commit"))
    shares = ", ".join(f"{phase} {count}" for phase, count in histogram.most_common())
    record_property("measured", f"{histogram.total()} kills in {number} stores of {len(capture.rows)} units: {shares}")
    assert inside >= 0.8 * kills, f"too few kills during encode, put or commit: {histogram}"


def disturbed(store, capture, checks, rng: random.Random, kills: int, longest_wait_s: float) -> Counter:
    """Run four writers until all units are committed, and kill one at a time; counts the phases they were killed in.

    A writer that has not reached its first unit is not killed, however long a busy machine takes to start it.
    """
    killed = Counter()
    writers = {number: capture.start(store, writer=number) for number in range(checks.WRITERS)}
    while any(writer.is_alive() for writer in writers.values()):
        time.sleep(rng.uniform(0.0, longest_wait_s))
        number = rng.randrange(checks.WRITERS)
        has_begun = capture.phase(number) not in ("start", "look")
        if killed.total() < kills and has_begun and writers[number].is_alive():
            writers[number].kill()
            if checks.died_of_kill(writers[number]):
                killed[capture.phase(number)] += 1
            writers[number] = capture.start(store, writer=number)
    return killed
