"""The Ray actor that hosts a teacher: it scores a unit and returns once the unit is committed.

It reads the unit from the store itself, so nothing but ids passes the driver. Several calls are in the actor at a
time: one in the engine, one in the store thread (encoding, hashing, upload), one that waits. So the device has the
prefill of the next unit while the last unit is stored, and a call still answers for exactly one unit.

Every call may be repeated at any time: a unit that is committed is not scored again, and of two commits one wins.
"""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from actors.checks.faithfulness import Comparison, compare_unit
from actors.replicas.actor import ReplicaActor
from actors.replicas.metrics import TeacherMetrics
from actors.replicas.work import QuarantinedRow, WorkItem, WorkResult
from actors.scoring.score_rows import Scored, Stopwatch, score_rows
from pipeline.cache import quarantine
from pipeline.cache.commit import commit_unit, read_commit
from pipeline.cache.description import write_teacher
from pipeline.cache.format.schema import ShardSpec
from pipeline.cache.format.shard_writer import encode_shard
from pipeline.cache.lm_head import write_lm_head
from pipeline.cache.manifest import write_manifest
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage.layout import LM_HEAD
from pipeline.cache.storage.store import Store
from pipeline.cache.unit_list import UnitList
from pipeline.config import TeacherSpec
from pipeline.contracts import CaptureSpec, Engine, ScoredSequence, TokenSequence, Unit
from pipeline.corpus.prepare import resolve_teacher_model

CONCURRENT_CALLS = 3
"""One in the engine, one in the store thread, one that waits."""
CHECK_UNITS = 4
CHECK_ROWS = 2
WARM_UP_TOKENS = 512
"""The most tokens of the row that a new engine scores first."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class TeacherActorConfig:
    """The teacher, the cache that it fills, and how."""

    cache_uri: str
    teacher: TeacherSpec
    spec: CaptureSpec
    threads: int
    """CPU threads of the engine."""
    sequence_length: int | None = None
    """Tokens of the longest sequence; None: as many as the model supports."""


class TeacherActor(ReplicaActor[Engine]):
    """One replica of a scoring pool, with `CONCURRENT_CALLS` calls at a time."""

    def __init__(self, config: TeacherActorConfig) -> None:
        super().__init__(config.teacher.name, config.threads)
        self._config = config
        self._store = Store.open(config.cache_uri)
        self._engine_thread = ThreadPoolExecutor(1, "engine")
        self._store_thread = ThreadPoolExecutor(1, "store")
        self._unit_list_lock = threading.Lock()  # a unit list keeps its last file open for the next unit
        self._stopwatch = Stopwatch()

    def open(self) -> None:
        """Open the engine. Raises ModelError, RecipeError, EngineDead and StorageError."""
        self._engine = self._at_engine(lambda: self._open(self._open_engine))
        description = self._engine.describe()
        self._shard = ShardSpec.of(self._config.spec, description)
        self._units = UnitList.open(self._store)
        self._metrics = TeacherMetrics(self._config.teacher.name)
        write_teacher(self._store, description, self._shard)
        if not self._store.exists(LM_HEAD) and (head := self._engine.lm_head()) is not None:
            write_lm_head(self._store, head)

    def warm_up(self) -> WorkResult:
        """Score a synthetic row twice and time the second run, since engines compile on first use. Raises EngineDead.

        No row of the corpus, since that may be poison. If the engine refuses this row, nothing is measured.
        """
        row = _synthetic_row(min(int(self._units.n_tokens(self._units.unit_ids()[0]).max()), WARM_UP_TOKENS))
        self._at_engine(lambda: score_rows(self._opened, [row]))
        started_s = time.monotonic()
        scored, _ = self._at_engine(lambda: score_rows(self._opened, [row]))
        return WorkResult(row.sequence_id, tokens=_tokens(scored), engine_s=time.monotonic() - started_s)

    def capture(self, item: WorkItem) -> WorkResult:
        """Score, store and commit a unit; with `rows` set, score these and discard the result.

        Raises EngineDead and StorageError.
        """
        if item.rows is None and read_commit(self._store, item.item_id) is not None:
            return WorkResult(item.item_id)
        with self._unit_list_lock:
            unit = self._units.read(item.item_id)
        excluded = {row.sequence_id for row in item.quarantined}
        rows = [row for row in unit.sequences[slice(*(item.rows or (None, None)))] if row.sequence_id not in excluded]
        (scored, lost), engine_s = self._score(rows, one_by_one=item.one_by_one)
        if item.rows is not None:
            return WorkResult(item.item_id, tokens=_tokens(scored), engine_s=engine_s)
        return self._store_thread.submit(self._commit, unit, (scored, [*item.quarantined, *lost]), engine_s).result()

    def check(self, item: WorkItem) -> Comparison:
        """Score some committed rows twice more and compare them with the cache. Raises EngineDead."""
        cached = CacheReader.open(self._store).read_unit(item.item_id)[slice(*(item.rows or (None, None)))]
        return self._at_engine(lambda: compare_unit(self._opened, cached, self._shard))

    def finish(self, item: WorkItem) -> tuple[WorkItem, ...]:
        """Write the manifest, and return the `check` items for a random sample of units (same seed in every run)."""
        manifest = write_manifest(self._store)
        committed = [commit.unit_id for commit in manifest.commits if commit.rows]
        size = min(CHECK_UNITS, 1 + len(committed) // 50, len(committed))
        sample = sorted(random.Random(0).sample(committed, size))
        return tuple(WorkItem(unit_id, "check", rows=(0, CHECK_ROWS)) for unit_id in sample)

    def close(self) -> None:
        """Close the engine, which frees its memory."""
        if self._engine is not None:
            self._engine_thread.submit(self._engine.close).result()

    def _open_engine(self) -> Engine:
        from actors.engines import open_engine

        config = self._config
        return open_engine(config.teacher, resolve_teacher_model(config.teacher), config.spec, config.sequence_length)

    def _score(self, rows: list[TokenSequence], *, one_by_one: bool = False) -> tuple[Scored, float]:
        def timed() -> tuple[Scored, float]:
            started_s = time.monotonic()
            scored = score_rows(self._opened, rows, one_by_one=one_by_one)
            seconds = time.monotonic() - started_s
            self._stopwatch.add(seconds)
            return scored, seconds

        return self._at_engine(timed)

    def _commit(self, unit: Unit, result: Scored, engine_s: float) -> WorkResult:
        """Runs in the store thread. Quarantine first, so that a commit never lacks a row without a reason on record."""
        started_s = time.monotonic()
        scored, lost = result
        for row in lost:
            quarantine.record(self._store, row.sequence_id, unit.unit_id, row.reason, row.engine_message)
        data = encode_shard(scored, self._shard)
        commit_unit(self._store, unit.unit_id, data, scored, _in_order(lost, unit))
        committed = WorkResult(
            item_id=unit.unit_id,
            rows=len(scored),
            tokens=_tokens(scored),
            stored_bytes=len(data),
            engine_s=engine_s,
            store_s=time.monotonic() - started_s,
            quarantined=len(lost),
        )
        self._metrics.record(committed, self._stopwatch.wait_share())
        return committed

    def _at_engine(self, call: Callable[[], Result]) -> Result:
        """Run in the engine thread, always the same one. The process exits if its engine is dead."""
        return self._exit_on_dead_engine(lambda: self._engine_thread.submit(call).result())


def _synthetic_row(tokens: int) -> TokenSequence:
    """That many times token 0, which every vocabulary has."""
    mask_N, end_N = np.ones(tokens, np.uint8), np.arange(1, tokens + 1, dtype=np.int32)
    return TokenSequence("warm-up", "warm-up", None, "train", np.zeros(tokens, np.int32), mask_N, end_N)


def _tokens(scored: list[ScoredSequence]) -> int:
    return sum(len(row.sequence.input_ids_N) for row in scored)


def _in_order(lost: list[QuarantinedRow], unit: Unit) -> list[str]:
    """Ids of the lost rows in the unit's order, so that equal results make equal commits."""
    lost_ids = {row.sequence_id for row in lost}
    return [sequence.sequence_id for sequence in unit.sequences if sequence.sequence_id in lost_ids]
