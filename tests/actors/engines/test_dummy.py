import os
import time

import numpy as np
import pytest

from actors.engines import open_engine
from pipeline.bfloat16 import to_float32
from pipeline.config.capture import TeacherSpec
from pipeline.contracts import CaptureSpec, TargetMode, TokenSequence
from pipeline.errors import EngineDead, EngineError, RecipeError, RowError


def teacher(**options):
    return TeacherSpec(name="t", model="none", engine="dummy", options=options)


def sequence(name="s0", tokens=24, vocabulary=512, audited=False):
    ids = np.random.default_rng(len(name) + tokens).integers(0, vocabulary, tokens).astype(np.int32)
    return TokenSequence(
        name, "d", None, "train", ids, np.ones(tokens, np.uint8), np.arange(tokens, dtype=np.int32), audited=audited
    )


@pytest.mark.parametrize("mode", list(TargetMode))
def test_weights_and_tail_sum_to_one_in_every_mode(mode):
    engine = open_engine(teacher(), None, CaptureSpec(mode=mode, k=16, draws=16, top_p=0.9))
    (signals,) = engine.score([sequence()])
    total = np.exp(signals.entry_logweight_TK.astype(np.float64)).sum(1) + np.exp(signals.tail_logmass_T)
    np.testing.assert_allclose(total, 1.0, atol=2e-6)
    assert (signals.entry_logweight_TK[:, 1:] <= signals.entry_logweight_TK[:, :-1]).all()
    assert (signals.entry_id_TK[np.isneginf(signals.entry_logweight_TK)] == 0).all()


def test_signals_depend_on_seed_and_token_ids_and_not_on_the_batch():
    spec = CaptureSpec(mode=TargetMode.UNBIASED, k=8, hidden_layers=(0, 2, -1))
    single = open_engine(teacher(), None, spec).score([sequence()])[0]
    batched = open_engine(teacher(), None, spec).score([sequence("x", 7), sequence()])[1]
    other_seed = open_engine(teacher(seed=1), None, spec).score([sequence()])[0]
    for field in ("entry_id_TK", "entry_logweight_TK", "entropy_T", "hidden_TLD"):
        assert getattr(single, field).tobytes() == getattr(batched, field).tobytes()
    assert single.entropy_T.tobytes() != other_seed.entropy_T.tobytes()


def test_lm_head_times_exact_hidden_is_the_distribution():
    engine = open_engine(teacher(width=48), None, CaptureSpec(k=4, hidden_layers=(-1,)))
    row = sequence(audited=True)
    (signals,) = engine.score([row])
    logits = to_float32(signals.exact_hidden_TD).astype(np.float64) @ to_float32(engine.lm_head().weight_VD).T.astype(
        np.float64
    )
    logprob = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(logprob[np.arange(23), row.input_ids_N[1:]], signals.label_logprob_T, atol=1e-5)
    np.testing.assert_array_equal(logprob.argmax(1), signals.entry_id_TK[:, 0])
    np.testing.assert_array_equal(signals.hidden_TLD[:, 0], signals.exact_hidden_TD)
    np.testing.assert_allclose(-(np.exp(logprob) * logprob).sum(1), signals.entropy_T, atol=1e-5)


def test_only_audited_sequences_carry_the_exact_state():
    engine = open_engine(teacher(), None, CaptureSpec(k=4))
    plain, audited = engine.score([sequence("a"), sequence("b", audited=True)])
    assert plain.exact_hidden_TD is None
    assert audited.exact_hidden_TD.shape == (23, 32)


@pytest.mark.parametrize(("fault", "error"), [("row_error", RowError), ("error", EngineError), ("dead", EngineDead)])
def test_faults_are_injected_for_the_named_sequences_only(fault, error):
    engine = open_engine(teacher(**{f"{fault}_on": "bad,worse"}), None, CaptureSpec(k=4))
    engine.score([sequence("good")])
    with pytest.raises(error):
        engine.score([sequence("good"), sequence("worse")])


def test_faults_are_injected_at_every_nth_call():
    engine = open_engine(teacher(dead_every=3), None, CaptureSpec(k=4))
    engine.score([sequence()])
    engine.score([sequence()])
    with pytest.raises(EngineDead):
        engine.score([sequence()])


def test_starts_are_logged_and_the_first_dead_openings_raise(tmp_path):
    opened = teacher(openings=str(tmp_path / "log"), dead_openings=2)
    for opening in (1, 2):
        with pytest.raises(EngineDead, match=f"engine died at opening {opening}"):
            open_engine(opened, None, CaptureSpec(k=4))
    open_engine(opened, None, CaptureSpec(k=4))
    assert (tmp_path / "log").read_text().split() == [str(os.getpid())] * 3


def test_delay_is_proportional_to_the_tokens():
    engine = open_engine(teacher(delay_s_per_token=0.005), None, CaptureSpec(k=4))
    start = time.monotonic()
    engine.score([sequence(tokens=40)])
    assert time.monotonic() - start >= 0.2


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "message"),
    [(1, 512, "at least 2"), (40, 512, "at most 30"), (24, 9000, "token ids in 0..511")],
)
def test_row_errors_name_the_sequence(tokens, vocabulary, message):
    engine = open_engine(teacher(max_tokens=30), None, CaptureSpec(k=4))
    with pytest.raises(RowError, match=message) as caught:
        engine.score([sequence("good"), sequence("bad", tokens, vocabulary)])
    assert caught.value.sequence_id == "bad"


@pytest.mark.parametrize(
    ("options", "spec", "message"),
    [
        ({"vocabulary": 16}, CaptureSpec(k=16), r"capture.k: expected 1..V-1 \(V=16"),
        ({"layers": 3}, CaptureSpec(k=4, hidden_layers=(4,)), "hidden_layers: expected 0..3 or -1"),
        ({"speed": 3}, CaptureSpec(k=4), "got speed"),
    ],
)
def test_invalid_specs_and_options_are_refused_when_the_engine_opens(options, spec, message):
    with pytest.raises(RecipeError, match=message):
        open_engine(teacher(**options), None, spec)


def test_dummy_scores_thousands_of_rows_a_second():
    engine = open_engine(teacher(), None, CaptureSpec(k=64))
    rows = [sequence(f"s{i}", 256) for i in range(8)]
    engine.score(rows[:1])
    start = time.thread_time()  # CPU time of this thread only: BLAS threads may spin
    engine.score(rows)
    assert 8 * 255 / (time.thread_time() - start) > 2000
