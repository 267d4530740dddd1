"""Processes that write synthetic units to a store and are killed, and checks of the store afterwards."""

import multiprocessing
import multiprocessing.context
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from pipeline.cache.commit import commit_unit, committed_units, read_commits
from pipeline.cache.description import write_cache_identity, write_teacher
from pipeline.cache.format.shard_writer import encode_shard
from pipeline.cache.gc import collect_garbage
from pipeline.cache.manifest import write_manifest
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage import fault_points
from pipeline.cache.storage.store import Store
from pipeline.cache.unit_list import write_units
from pipeline.contracts import ScoredSequence, Unit

WRITERS = 4
PHASES = ("start", "look", "encode", "put", "commit", "after")
_PHASE_OF_POINT = {
    "before_write": "put",
    "mid_write": "put",
    "after_write": "put",
    "before_commit": "commit",
    "after_commit": "after",
    "before_manifest": "after",
}
_FORK = multiprocessing.get_context("fork")


class Capture:
    """A plan of synthetic units, and writers that fill stores with it."""

    def __init__(self, made, units: int, sequences: int) -> None:
        self.made = made
        self.units: list[Unit] = [made.unit(number, sequences) for number in range(units)]
        self.rows: dict[str, list[ScoredSequence]] = {unit.unit_id: made.rows(unit) for unit in self.units}
        self.phase_W = _FORK.RawArray("b", WRITERS)

    def prepare(self, folder: Path) -> Store:
        store = Store.open(folder)
        write_cache_identity(store, {"of": "made-up"})
        write_units(store, self.units)
        write_teacher(store, self.made.teacher, self.made.spec)
        return store

    def write(self, store: Store, unit_ids: Iterable[str], writer: int = 0) -> None:
        """Commit the units that are not committed yet."""
        self._enter("look", writer)
        done = set(committed_units(store))
        for unit_id in unit_ids:
            if unit_id not in done:
                self._enter("encode", writer)
                rows = self.rows[unit_id]
                commit_unit(store, unit_id, encode_shard(rows, self.made.spec), rows)

    def run(self, store: Store) -> None:
        """All units, then the manifest: the same command is the resume."""
        self.write(store, self.rows)
        write_manifest(store)

    def start(self, store: Store, *, fault: str = "", writer: int | None = None) -> multiprocessing.context.ForkProcess:
        """Start a writer process: of all units, or one of several that begin at different units."""
        if writer is not None:
            self._enter("start", writer)  # not the phase in which its predecessor was killed
        process = _FORK.Process(target=self._main, args=(store.uri, fault, writer))
        process.start()
        return process

    def _main(self, uri: str, fault: str, writer: int | None) -> None:
        os.environ[fault_points.ENVIRONMENT_KEY] = fault
        if writer is None:
            return self.run(Store.open(uri))
        fault_point = fault_points.fault_point

        def noted(point: fault_points.Point, unit_id: str) -> None:
            self._enter(_PHASE_OF_POINT[point], writer)
            fault_point(point, unit_id)

        fault_points.fault_point = noted
        unit_ids, first = list(self.rows), writer * len(self.rows) // WRITERS
        return self.write(Store.open(uri), unit_ids[first:] + unit_ids[:first], writer)

    def _enter(self, phase: str, writer: int) -> None:
        self.phase_W[writer] = PHASES.index(phase)

    def phase(self, writer: int) -> str:
        return PHASES[self.phase_W[writer]]


def check_commits(store: Store, capture: Capture) -> None:
    """Check that every commit can be read."""
    reader = CacheReader.open(store)
    for commit in read_commits(store):
        rows = reader.read_unit(commit.unit_id)
        assert [row.sequence.sequence_id for row in rows] == ids_of(capture.rows[commit.unit_id])


def check_whole(store: Store, capture: Capture, undisturbed: bytes) -> None:
    """Check that no row is lost or duplicated, the manifest is that of a run without faults, and gc keeps commits."""
    assert store.read("manifest.json") == undisturbed
    seen = Counter(row.sequence.sequence_id for row in CacheReader.open(store).rows())
    wanted = Counter(name for rows in capture.rows.values() for name in ids_of(rows))
    assert seen == wanted, f"lost {wanted - seen}, duplicated {seen - wanted}"
    collect_garbage(store, grace_s=0.0)
    assert store.list("data") == sorted(commit.file for commit in read_commits(store))
    assert store.temporary_files() == []
    assert store.read("manifest.json") == undisturbed


def ids_of(rows: Sequence[ScoredSequence]) -> list[str]:
    return [row.sequence.sequence_id for row in rows]


def died_of_kill(process: multiprocessing.context.ForkProcess) -> bool:
    process.join()
    return process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="session")
def capture_of(made_up):
    """`capture_of(units, sequences)`."""
    return lambda units, sequences: Capture(made_up(), units, sequences)


@pytest.fixture(scope="session")
def checks():
    """This module, for its `check_` functions."""
    return sys.modules[__name__]
