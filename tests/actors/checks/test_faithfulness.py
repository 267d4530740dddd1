"""The faithfulness check with a large vocabulary: with few ids, two caches would share some by chance."""

from dataclasses import replace

import numpy as np
import pytest

from actors.checks.distances import DISTANCES
from actors.checks.faithfulness import Comparison, assess, compare_unit
from actors.engines.dummy import DummyEngine
from pipeline.cache.faithfulness import read_verdict
from pipeline.cache.format.codecs import decode_signals, encode_signals
from pipeline.cache.format.schema import ShardSpec
from pipeline.cache.storage.layout import FAITHFULNESS_JSON
from pipeline.cache.storage.store import Store
from pipeline.config import TeacherSpec
from pipeline.contracts import CaptureSpec, ScoredSequence, TargetMode, TokenSequence

MODES = list(TargetMode)
VOCABULARY = 20_000


def engine_of(mode, seed=0, **capture):
    teacher = TeacherSpec.model_validate(
        {"name": "a", "model": "dummy", "engine": "dummy", "options": {"vocabulary": VOCABULARY, "seed": seed}}
    )
    spec = CaptureSpec(mode=mode, k=16, draws=16, hidden_layers=(1, -1), **capture)
    engine = DummyEngine(teacher, None, spec)
    return engine, ShardSpec.of(spec, engine.describe())


def sequences(count=2, tokens=13):
    return [
        TokenSequence(
            f"s{i}",
            "d",
            None,
            "train",
            np.random.default_rng(i).integers(0, VOCABULARY, tokens).astype(np.int32),
            np.ones(tokens, np.uint8),
            np.arange(1, tokens + 1, dtype=np.int32),
        )
        for i in range(count)
    ]


def cached(engine, spec):
    """Rows as a reader of the cache gets them: encoded and decoded."""
    rows = sequences()
    stored = [decode_signals(encode_signals(s, spec), len(r.input_ids_N), spec) for r, s in pair(engine, rows)]
    return [ScoredSequence(*both) for both in zip(rows, stored, strict=True)]


def pair(engine, rows):
    return zip(rows, engine.score(rows), strict=True)


def verdict_on(engine, spec, rows):
    return assess([compare_unit(engine, rows, spec)], ["train-00000"])


def changed(rows, **functions):
    """Rows with functions applied to fields of their signals."""
    return [
        replace(row, signals=replace(row.signals, **{n: f(getattr(row.signals, n)) for n, f in functions.items()}))
        for row in rows
    ]


@pytest.mark.parametrize("codec", ["bf16", "int8"])
@pytest.mark.parametrize("mode", MODES)
def test_a_cache_of_the_same_teacher_is_usable(mode, codec):
    engine, spec = engine_of(mode, hidden_codec=codec)
    verdict = verdict_on(engine, spec, cached(engine, spec))
    assert verdict.usable, verdict.why
    for distance in verdict.distances.values():
        assert distance.live_vs_live == 0.0
        assert distance.live_vs_cache == pytest.approx(distance.codec)


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_of_another_teacher_is_not(mode):
    engine, spec = engine_of(mode)
    other, _ = engine_of(mode, seed=1)
    verdict = verdict_on(engine, spec, cached(other, spec))
    assert not verdict.usable
    unseen = {"kl_nats"} if mode is TargetMode.SAMPLED else set()  # which compares the label alone
    assert {name for name, distance in verdict.distances.items() if distance.within} <= unseen
    assert "further from the teacher" in verdict.why


@pytest.mark.parametrize("shift", [1, 7, VOCABULARY // 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_cache_of_wrong_ids_is_not(mode, shift):
    engine, spec = engine_of(mode)
    rows = changed(cached(engine, spec), entry_id_TK=lambda ids: (ids + shift) % VOCABULARY)
    verdict = verdict_on(engine, spec, rows)
    assert not verdict.usable
    assert not verdict.distances["top_share"].within
    assert verdict.distances["label_nats"].within


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_of_another_layer_is_not(mode):
    engine, spec = engine_of(mode)
    rows = changed(cached(engine, spec), hidden_TLD=lambda states: np.roll(states, 1, axis=1))
    verdict = verdict_on(engine, spec, rows)
    assert not verdict.usable
    assert [name for name, distance in verdict.distances.items() if not distance.within] == ["hidden_share"]
    assert verdict.why.startswith("error of hidden states ")


@pytest.mark.parametrize("name", ["label_logprob_T", "entropy_T"])
def test_a_cache_of_another_temperature_is_not(name):
    engine, spec = engine_of(TargetMode.SAMPLED)
    rows = changed(cached(engine, spec), **{name: lambda values: values / np.float32(1.1)})
    assert not verdict_on(engine, spec, rows).usable


@pytest.mark.parametrize("mode", MODES)
def test_rows_shifted_by_one_position_are_detected(mode):
    engine, spec = engine_of(mode)
    names = ("entry_id_TK", "entry_logweight_TK", "tail_logmass_T", "label_logprob_T")
    rows = changed(cached(engine, spec), **{name: lambda values: np.roll(values, 1, axis=0) for name in names})
    assert not verdict_on(engine, spec, rows).usable


def compared(cache, live, codec=0.0, name="kl_nats", positions=100):
    sums_3M = np.zeros((3, len(DISTANCES)))
    sums_3M[:, DISTANCES.index(name)] = cache, live, codec
    return Comparison(positions, sums_3M)


@pytest.mark.parametrize("name", DISTANCES)
def test_the_engines_own_noise_widens_what_is_allowed(name):
    quiet, noisy = assess([compared(20.0, 0.0, name=name)], ["u"]), assess([compared(20.0, 10.0, name=name)], ["u"])
    assert (quiet.usable, noisy.usable) == (False, True)


def test_a_cache_without_a_sample_is_not_usable():
    assert not assess([], []).usable


def test_nan_is_not_usable():
    assert not assess([compared(np.nan, 0.0)], ["u"]).usable


@pytest.mark.parametrize("live", [0.0, 10.0])
def test_a_verdict_is_read_as_it_was_written(tmp_path, live):
    verdict, store = assess([compared(20.0, live)], ["train-00000"]), Store.open(tmp_path)
    store.put(FAITHFULNESS_JSON, verdict.to_bytes())
    assert read_verdict(store) == verdict
