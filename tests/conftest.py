"""Fixtures for caches with made-up rows or captured in-process, and pytest hooks for all tests."""

import os
from collections.abc import Callable, Generator

import numpy as np
import pytest

from actors.engines import open_engine
from actors.scoring.score_rows import score_rows
from pipeline.cache.commit import commit_unit
from pipeline.cache.description import write_teacher
from pipeline.cache.format.schema import ShardSpec
from pipeline.cache.format.shard_writer import encode_shard
from pipeline.cache.lm_head import write_lm_head
from pipeline.cache.manifest import write_manifest
from pipeline.cache.unit_list import UnitList
from pipeline.config import Recipe
from pipeline.contracts import CaptureSpec, ScoredSequence, Signals, TeacherDescription, TokenSequence, Unit
from pipeline.corpus.prepare import prepare_cache
from pipeline.run.gc_paused import gc_paused
from pipeline.run.logs import configure_logging

# Several pytest workers share the CPUs: threads that spin at a barrier would slow down the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # OpenBLAS threads always spin
# Ray starts workers with niceness 15 by default, and the tests wait for them.
os.environ.setdefault("RAY_worker_niceness", "0")
# Do not prestart workers: half of them would not be used.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
configure_logging()  # as every process of the command line does
VOCABULARY = 500


def _sequence(number: int, split: str) -> TokenSequence:
    rng = np.random.default_rng(number)
    tokens = int(rng.integers(2, 40))
    return TokenSequence(
        sequence_id=f"{split}-sequence-{number:06d}",
        document_id=f"document {number // 3}/ä",
        domain=None if number % 2 else "prose",
        split=split,
        input_ids_N=rng.integers(0, VOCABULARY, tokens, dtype=np.int32),
        loss_mask_N=np.r_[0, rng.integers(0, 2, tokens - 1)].astype(np.uint8),
        byte_end_N=(7 + np.cumsum(rng.integers(1, 9, tokens))).astype(np.int32),
        byte_start=7,
        audited=number % 4 == 0,
    )


def _signals(sequence: TokenSequence, capture: CaptureSpec, width: int) -> Signals:
    rng = np.random.default_rng(len(sequence.input_ids_N))
    rows, k, layers = len(sequence.input_ids_N) - 1, capture.k, len(capture.hidden_layers)
    logit_TV = rng.normal(0, 3, (rows, VOCABULARY))
    logprob_TV = logit_TV - np.log(np.exp(logit_TV).sum(1, keepdims=True))
    id_TK = np.argsort(-logprob_TV, axis=1, kind="stable")[:, :k]
    weight_TK = np.take_along_axis(logprob_TV, id_TK, 1)
    return Signals(
        entry_id_TK=id_TK.astype(np.int32),
        entry_logweight_TK=weight_TK.astype(np.float32),
        tail_logmass_T=np.log1p(-np.exp(weight_TK).sum(1)).astype(np.float32),
        label_logprob_T=np.take_along_axis(logprob_TV, sequence.input_ids_N[1:, None], 1)[:, 0].astype(np.float32),
        entropy_T=-(np.exp(logprob_TV) * logprob_TV).sum(1).astype(np.float32),
        log_partition_TC=np.zeros((rows, len(capture.temperatures)), np.float32),
        hidden_TLD=rng.integers(0x3F00, 0x4000, (rows, layers, width)).astype(np.uint16) if layers else None,
        exact_hidden_TD=rng.integers(0x3F00, 0x4000, (rows, width)).astype(np.uint16) if sequence.audited else None,
    )


class MadeUp:
    """Units of random sequences and signals under one shard spec."""

    teacher = TeacherDescription("made-up", "None", VOCABULARY, 4, 16, "bfloat16", "dummy", "1")

    def __init__(self, **capture: object) -> None:
        self.spec = ShardSpec.of(CaptureSpec(**{"k": 8, **capture}), self.teacher)

    def unit(self, number: int, sequences: int = 4, split: str = "train") -> Unit:
        first = number * sequences
        rows = tuple(_sequence(first + row, split) for row in range(sequences))
        return Unit(f"{split}-{number:05d}", split, rows)

    def rows(self, unit: Unit) -> list[ScoredSequence]:
        width = self.teacher.hidden_width
        return [ScoredSequence(one, _signals(one, self.spec.capture, width)) for one in unit.sequences]


@pytest.fixture(scope="session")
def made_up() -> Callable[..., MadeUp]:
    return MadeUp


def _capture_in_process(recipe: Recipe, lost_rows: int = 0) -> None:
    for number, teacher in enumerate(recipe.teachers):
        cache = prepare_cache(recipe, teacher)
        engine = open_engine(teacher, cache.model, recipe.capture.spec(recipe.seed))
        shard = ShardSpec.of(recipe.capture.spec(recipe.seed), engine.describe())
        write_teacher(cache.store, engine.describe(), shard)
        write_lm_head(cache.store, engine.lm_head())
        units = UnitList.open(cache.store)
        for unit_id in cache.unit_ids:
            rows, _ = score_rows(engine, units.read(unit_id).sequences)
            lost = lost_rows if (number, unit_id) == (0, cache.unit_ids[0]) else 0
            quarantined = [row.sequence.sequence_id for row in rows[:lost]]
            commit_unit(cache.store, unit_id, encode_shard(rows[lost:], shard), rows[lost:], quarantined)
        write_manifest(cache.store)


@pytest.fixture(scope="session")
def capture_here() -> Callable[..., None]:
    """Capture all caches of a recipe in this process, without Ray; `lost_rows` of the first unit are quarantined."""
    return _capture_in_process


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print values that tests recorded by `record_property("measured", ...)`; prints in xdist workers are lost."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    measured = [
        (report.nodeid, value) for report in reports for name, value in report.user_properties if name == "measured"
    ]
    if measured:
        terminalreporter.section("measured")
    for nodeid, value in sorted(set(measured)):
        terminalreporter.write_line(f"{nodeid}: {value}")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Pause the garbage collector while test modules and their packages are imported."""
    with gc_paused():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first, so that the last files are short and the workers finish together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, len(item.path.parts)))
