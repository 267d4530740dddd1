from dataclasses import replace

import numpy as np
import pytest

from actors.engines.dummy import DummyEngine
from actors.faithfulness import Comparison, bucket_kl, compare_unit, judge
from pipeline.cache.schema import ShardSpec
from pipeline.config import TeacherSpec
from pipeline.contracts import CaptureSpec, ScoredSequence, TargetMode, TokenSequence

MODES = list(TargetMode)


def engine_of(mode, seed=0):
    teacher = TeacherSpec.model_validate(
        {"name": "a", "model": "dummy", "engine": "dummy", "options": {"vocabulary": 200, "seed": seed}}
    )
    spec = CaptureSpec(mode=mode, k=16, draws=64)
    engine = DummyEngine(teacher, None, spec)
    return engine, ShardSpec.of(spec, engine.describe())


def sequences(count=3, tokens=40):
    return [
        TokenSequence(
            f"s{i}",
            "d",
            None,
            "train",
            np.random.default_rng(i).integers(0, 200, tokens).astype(np.int32),
            np.ones(tokens, np.uint8),
            np.arange(1, tokens + 1, dtype=np.int32),
        )
        for i in range(count)
    ]


def cached(engine):
    rows = sequences()
    return [ScoredSequence(*pair) for pair in zip(rows, engine.score(rows), strict=True)]


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_of_this_very_teacher_is_usable(mode):
    engine, spec = engine_of(mode)
    comparison = compare_unit(engine, cached(engine), spec)
    assert comparison.live_vs_cache_nats == 0.0
    assert comparison.live_vs_live_nats == 0.0
    assert judge([comparison], ["u"]).usable


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_of_another_teacher_is_not(mode):
    engine, spec = engine_of(mode)
    other, _ = engine_of(mode, seed=1)
    verdict = judge([compare_unit(engine, cached(other), spec)], ["u"])
    assert not verdict.usable
    assert "further from the teacher" in verdict.why


@pytest.mark.parametrize("mode", MODES)
def test_rows_shifted_by_one_position_are_noticed(mode):
    engine, spec = engine_of(mode)
    shifted = [
        replace(row, signals=replace(row.signals, **{
            name: np.roll(getattr(row.signals, name), 1, axis=0)
            for name in ("entry_id_TK", "entry_logweight_TK", "tail_logmass_T", "label_logprob_T")
        }))
        for row in cached(engine)
    ]  # fmt: skip
    assert not judge([compare_unit(engine, shifted, spec)], ["u"]).usable


def test_the_divergence_is_that_of_the_known_entries_and_one_bucket():
    engine, _ = engine_of(TargetMode.TOPK)
    p, q = (signals for signals in engine.score(sequences(2)))
    assert (bucket_kl(p, p, TargetMode.TOPK) == 0.0).all()
    kl_T = bucket_kl(p, q, TargetMode.TOPK)
    t = int(np.argmax(kl_T))
    p_of = dict(zip(p.entry_id_TK[t], np.exp(p.entry_logweight_TK[t].astype(float)), strict=True))
    q_of = dict(zip(q.entry_id_TK[t], np.exp(q.entry_logweight_TK[t].astype(float)), strict=True))
    shared = p_of.keys() & q_of.keys()
    pairs = [(p_of[i], q_of[i]) for i in shared]
    pairs.append((1 - sum(a for a, _ in pairs), 1 - sum(b for _, b in pairs)))
    assert kl_T[t] == pytest.approx(sum(a * np.log(a / b) for a, b in pairs))


def test_the_engines_own_noise_widens_what_is_allowed():
    quiet = judge([Comparison(100, 2.0, 0.0, 0.0)], ["u"])
    noisy = judge([Comparison(100, 2.0, 2.0, 0.0)], ["u"])
    assert (quiet.usable, noisy.usable) == (False, True)


def test_without_a_sample_nothing_is_called_usable():
    assert not judge([], []).usable
