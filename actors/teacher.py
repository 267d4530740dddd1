"""The Ray actor that hosts a teacher: it takes a unit's id and comes back when the unit is committed.

It reads the unit from the store itself, so nothing but ids passes the driver. Several calls are in the actor at a
time: one at the engine, one in the store's thread (encoding, hashing, upload), one that waits. So the device has the
next unit's prefill while the last unit is being stored, and a call still answers for exactly one unit.

Every call may be repeated at any time: a unit that is committed is not scored again, and of two commits one wins.
"""

import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import ray

from actors.departure import Departure
from actors.faithfulness import Comparison, compare_unit
from actors.lease import Arrival, Casualty, Lease, Outcome
from actors.metrics import TeacherMetrics
from actors.rows import Scored, Stopwatch, score_rows
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
from pipeline.errors import EngineDead, StillhouseError

CALLS_AT_A_TIME = 3
"""One at the engine, one in the store's thread, one that waits."""
CHECK_UNITS = 4
CHECK_ROWS = 2
WARM_UP_TOKENS = 512
"""At most, in the row that a new engine scores first."""

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Posting:
    """Where a teacher works, and on what."""

    cache_uri: str
    teacher: TeacherSpec
    spec: CaptureSpec
    threads: int
    """For the arithmetic of an engine on a CPU."""
    sequence_length: int | None = None
    """Tokens of the longest sequence; unset, as many as the model can read."""


class Teacher:
    """One replica. Runs as a Ray actor with `max_concurrency=CALLS_AT_A_TIME`."""

    def __init__(self, posting: Posting) -> None:
        os.environ["OMP_NUM_THREADS"] = str(posting.threads)  # Ray sets it to 1; torch reads it when it is imported
        self._posting = posting
        self._store = Store.open(posting.cache_uri)
        self._engine_thread = ThreadPoolExecutor(1, "engine")
        self._store_thread = ThreadPoolExecutor(1, "store")
        self._one_reader = threading.Lock()  # a unit list keeps its last file open for the next unit
        self._stopwatch = Stopwatch()
        self._departure = Departure()
        self._engine: Engine | None = None

    def arrive(self) -> Arrival:
        """Where it is, as soon as the replica has a place."""
        self._departure.hold()
        return Arrival(os.getpid(), ray.get_runtime_context().get_node_id())

    def open(self) -> None:
        """Open the engine. Raises what keeps it from opening: ModelError, RecipeError, EngineDead, StorageError."""
        self._engine = self._at_engine(self._open_engine)
        description = self._engine.describe()
        self._shard = ShardSpec.of(self._posting.spec, description)
        self._units = UnitList.open(self._store)
        self._metrics = TeacherMetrics(self._posting.teacher.name)
        write_teacher(self._store, description, self._shard)
        if not self._store.exists(LM_HEAD) and (head := self._engine.lm_head()) is not None:
            write_lm_head(self._store, head)

    def warm_up(self) -> Outcome:
        """Score a made-up row twice: engines compile on first use, and only then show their pace. Raises EngineDead.

        No row of the corpus, since that may be poison. An engine that refuses this one teaches nothing.
        """
        row = _made_up_row(min(int(self._units.n_tokens(self._units.unit_ids()[0]).max()), WARM_UP_TOKENS))
        self._at_engine(lambda: score_rows(self._opened, [row]))
        started_s = time.monotonic()
        scored, _ = self._at_engine(lambda: score_rows(self._opened, [row]))
        return Outcome(row.sequence_id, tokens=_tokens(scored), score_s=time.monotonic() - started_s)

    def capture(self, lease: Lease) -> Outcome:
        """Score, store and commit a unit. Raises EngineDead, and StorageError."""
        if read_commit(self._store, lease.unit_id) is not None:
            return Outcome(lease.unit_id)
        unit = self._read(lease.unit_id)
        blamed = {casualty.sequence_id for casualty in lease.casualties}
        rows = [sequence for sequence in unit.sequences if sequence.sequence_id not in blamed]
        (scored, lost), score_s = self._score(rows, one_by_one=lease.one_by_one)
        return self._store_thread.submit(self._keep, unit, (scored, [*lease.casualties, *lost]), score_s).result()

    def probe(self, lease: Lease) -> Outcome:
        """Score some rows of a unit and keep nothing: does the engine live through it? Raises EngineDead."""
        rows = self._read(lease.unit_id).sequences[slice(*(lease.rows or (None, None)))]
        (scored, _), score_s = self._score(list(rows))
        return Outcome(lease.unit_id, tokens=_tokens(scored), score_s=score_s)

    def check(self, lease: Lease) -> Comparison:
        """Score some committed rows twice more, and hold them against what the cache says. Raises EngineDead."""
        cached = CacheReader.open(self._store).read_unit(lease.unit_id)[slice(*(lease.rows or (None, None)))]
        return self._at_engine(lambda: compare_unit(self._opened, cached, self._shard))

    def finish(self, lease: Lease) -> tuple[Lease, ...]:
        """Write the manifest, which takes memory for every commit, and answer with what is to be checked."""
        manifest = write_manifest(self._store)
        committed = [commit.unit_id for commit in manifest.commits if commit.rows]
        size = min(CHECK_UNITS, 1 + len(committed) // 50, len(committed))
        chosen = sorted(random.Random(0).sample(committed, size))
        return tuple(Lease(unit_id, rows=(0, CHECK_ROWS), check=True) for unit_id in chosen)

    def wait_share(self) -> float:
        """Share of the time that the engine had no work."""
        return self._stopwatch.wait_share()

    def close(self) -> None:
        """Give the engine's memory back."""
        if self._engine is not None:
            self._engine_thread.submit(self._engine.close).result()

    def _read(self, unit_id: str) -> Unit:
        with self._one_reader:
            return self._units.read(unit_id)

    @property
    def _opened(self) -> Engine:
        if self._engine is None:
            raise EngineDead(f"teacher {self._posting.teacher.name}: the engine did not open")
        return self._engine

    def _open_engine(self) -> Engine:
        """In the engine's thread. Whatever breaks there may have broken the process: a CUDA error stays for good."""
        from actors.engines import open_engine

        posting = self._posting
        try:
            return open_engine(
                posting.teacher, resolve_teacher_model(posting.teacher), posting.spec, posting.sequence_length
            )
        except StillhouseError:
            raise
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise EngineDead(f"teacher {posting.teacher.name}: the engine did not open: {message}") from error

    def _score(self, rows: list[TokenSequence], *, one_by_one: bool = False) -> tuple[Scored, float]:
        def timed() -> tuple[Scored, float]:
            started_s = time.monotonic()
            scored = score_rows(self._opened, rows, one_by_one=one_by_one)
            seconds = time.monotonic() - started_s
            self._stopwatch.timed(seconds)
            return scored, seconds

        return self._at_engine(timed)

    def _keep(self, unit: Unit, result: Scored, score_s: float) -> Outcome:
        """In the store's thread. Quarantine first: a commit that lacks a row must never stand without the reason."""
        started_s = time.monotonic()
        scored, casualties = result
        for lost in casualties:
            quarantine.record(self._store, lost.sequence_id, unit.unit_id, lost.reason, lost.engine_message)
        data = encode_shard(scored, self._shard)
        commit_unit(self._store, unit.unit_id, data, scored, _in_order(casualties, unit))
        outcome = Outcome(
            unit_id=unit.unit_id,
            rows=len(scored),
            tokens=_tokens(scored),
            stored_bytes=len(data),
            score_s=score_s,
            store_s=time.monotonic() - started_s,
            casualties=len(casualties),
        )
        self._metrics.record(outcome, self._stopwatch.wait_share())
        return outcome

    def _at_engine(self, work: Callable[[], Answer]) -> Answer:
        """Run in the engine's thread, always the same one. A process whose engine is dead leaves."""
        return self._departure.upon_death(lambda: self._engine_thread.submit(work).result())


def _made_up_row(tokens: int) -> TokenSequence:
    """That many times the first token of any vocabulary."""
    mask_N, end_N = np.ones(tokens, np.uint8), np.arange(1, tokens + 1, dtype=np.int32)
    return TokenSequence("warm-up", "warm-up", None, "train", np.zeros(tokens, np.int32), mask_N, end_N)


def _tokens(scored: list[ScoredSequence]) -> int:
    return sum(len(row.sequence.input_ids_N) for row in scored)


def _in_order(casualties: list[Casualty], unit: Unit) -> list[str]:
    """The lost rows' ids in the unit's order, so that equal outcomes make equal commits."""
    lost = {casualty.sequence_id for casualty in casualties}
    return [sequence.sequence_id for sequence in unit.sequences if sequence.sequence_id in lost]
