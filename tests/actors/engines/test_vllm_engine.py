import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from actors.engines.word_starts import word_starts
from actors.signals.reference import reference_signals
from pipeline.config.capture import CaptureSettings

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("score_with_vllm.py")
EVERYTHING = {
    "k": 16, "temperatures": [1.0, 2.0, 1.5], "any_temperature": True, "boundary": True,
    "hidden_layers": [-1, 2, 0, 4],
}  # fmt: skip
SCALARS = ("tail_logmass_T", "label_logprob_T", "entropy_T", "log_partition_TC", "tail_shape_T3", "boundary_logmass_T")


def everything(mode):
    """All that a capture in that mode may ask for."""
    return EVERYTHING | {"mode": mode, "any_temperature": mode == "topk"}


def hosting(model, calls, *, teacher, spec):
    settings = {"name": "t", "model": str(model), "dtype": "float32", "kv_cache_gib": 0.1}
    rows = [
        [{"name": s.sequence_id, "ids": s.input_ids_N.tolist(), "audited": s.audited} for s in call] for call in calls
    ]
    return {"model": str(model), "teacher": settings | teacher, "spec": spec, "calls": rows}


def run(folder, hosted, refused=()):
    """What each opening or call ended with, and the signals of every scored row by (call, row)."""
    (folder / "job.json").write_text(json.dumps({"hosted": hosted, "refused": refused}))
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, SCRIPT, folder / "job.json", folder],
        capture_output=True, text=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, timeout=280, check=False,
    )  # fmt: skip
    ends = [line for line in done.stdout.splitlines() if line.startswith("ENDS ")]
    assert ends, done.stderr[-3000:]
    found = {tuple(map(int, path.stem.split("-"))): np.load(path) for path in folder.glob("*.npz")}
    return json.loads(ends[0].removeprefix("ENDS ")), found


def chunked(folder, model, rows, mode):
    """200 tokens in steps of at most 64: the third sequence takes three. 7-row chunks of logits cross sequences."""
    teacher = {"max_batched_tokens": 64, "chunk_rows": 7}
    ends, found = run(folder, hosting(model, [rows], teacher=teacher, spec=everything(mode)))
    assert ends == ["scored"]
    return found


@pytest.fixture(scope="module")
def five_rows(sequences):
    return sequences(30, 2, 100, 11, 40, audited=(2,))


@pytest.fixture(scope="module")
def topk_run(tmp_path_factory, tiny_llama, five_rows):
    return chunked(tmp_path_factory.mktemp("topk"), tiny_llama.path, five_rows, "topk")


def assert_as_plain(found, rows, model, forward, mode):
    spec, starts = CaptureSettings(**everything(mode)).spec(0), word_starts(model.path, 320)
    for index, row in enumerate(rows):
        got = found[0, index]
        expected = reference_signals(forward.logits(row), row.input_ids_N[1:], spec, row.sequence_id, starts)
        assert got["entry_id_TK"].shape == (len(row.input_ids_N) - 1, 16)
        given = [name for name in SCALARS if getattr(expected, name) is not None]
        assert [name for name in SCALARS if name in got] == given
        for name in given:  # float32 against float32: other kernels, other order of sums
            np.testing.assert_allclose(got[name], getattr(expected, name), atol=2e-4, rtol=1e-4, err_msg=name)
        assert (got["entry_id_TK"] == expected.entry_id_TK).mean() > 0.98
        assert np.isclose(got["entry_logweight_TK"], expected.entry_logweight_TK, atol=2e-4).mean() > 0.98


def test_signals_equal_a_plain_float32_forward_through_chunked_prefill(topk_run, five_rows, tiny_llama, plain):
    assert_as_plain(topk_run, five_rows, tiny_llama, plain(tiny_llama.path), "topk")


def test_samples_are_those_of_seed_and_sequence_through_chunked_prefill(tmp_path, five_rows, tiny_llama, plain):
    found = chunked(tmp_path, tiny_llama.path, five_rows, "unbiased")
    assert_as_plain(found, five_rows, tiny_llama, plain(tiny_llama.path), "unbiased")


def test_hidden_layers_are_the_streams_that_the_contract_names(topk_run, five_rows, tiny_llama, plain, floats):
    got, forward = topk_run[0, 2], plain(tiny_llama.path)
    hidden = floats(got["hidden_TLD"])
    for column, layer in enumerate((-1, 2, 0)):  # bfloat16 keeps 8 bits: half a unit is 1/256 of the value
        np.testing.assert_allclose(hidden[:, column], forward.hidden(five_rows[2], layer), rtol=1 / 200, atol=1e-3)
    before_norm = hidden[:, 3]  # layer 4 of 4, which transformers gives only after the norm
    normed = before_norm / np.sqrt((before_norm**2).mean(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normed, forward.hidden(five_rows[2], -1), rtol=1 / 50, atol=0.02)
    np.testing.assert_array_equal(got["exact_hidden_TD"], got["hidden_TLD"][:, 0])
    assert "exact_hidden_TD" not in topk_run[0, 1]


def test_two_ranks_say_what_one_says(tmp_path, topk_run, five_rows, tiny_llama):
    hosted = hosting(tiny_llama.path, [five_rows], teacher={"tensor_parallel": 2}, spec=EVERYTHING)
    ends, found = run(tmp_path, hosted)
    assert ends == ["scored"]
    for index in range(len(five_rows)):
        for name in SCALARS:  # sums over two halves of each layer, in float32
            np.testing.assert_allclose(found[0, index][name], topk_run[0, index][name], atol=2e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def bfloat16_run(tmp_path_factory, tiny_llama, sequences):
    """GPT-2 asked for a hidden layer, then a bfloat16 teacher asked for a row too long, then for two good ones."""
    folder = tmp_path_factory.mktemp("bfloat16")
    gpt2 = hosting(folder, [sequences(20, vocabulary=100)], teacher={}, spec={"k": 4, "hidden_layers": [1]})
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=2, n_positions=64))
    model.save_pretrained(folder)
    calls = [sequences(20, 129), sequences(60, 90)]
    return run(folder, hosting(tiny_llama.path, calls, teacher={"dtype": "bfloat16"}, spec={"k": 16}), [gpt2])


def test_bfloat16_stays_within_its_noise_and_bad_rows_do_not_stop_the_engine(
    bfloat16_run, tiny_llama, plain, sequences
):
    (_, *ends), found = bfloat16_run
    rows = sequences(60, 90)
    assert ends == ["RowError: sequence s1: expected at most 128 tokens, got 129", "scored"]
    forward = plain(tiny_llama.path)
    for index, row in enumerate(rows):
        expected = reference_signals(
            forward.logits(row), row.input_ids_N[1:], CaptureSettings(k=16).spec(0), row.sequence_id
        )
        off = np.abs(found[1, index]["label_logprob_T"] - expected.label_logprob_T)
        assert off.mean() < 0.1
        assert (found[1, index]["entry_id_TK"][:, 0] == expected.entry_id_TK[:, 0]).mean() > 0.9
        assert "exact_hidden_TD" not in found[1, index]


def test_a_model_without_hidden_layers_is_refused_by_name(bfloat16_run):
    (refusal, *_), _ = bfloat16_run
    assert refusal.startswith("ModelError: teacher t: vllm's GPT2LMHeadModel gives no hidden layers but -1, got [1]")
