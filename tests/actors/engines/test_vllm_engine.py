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
from pipeline.bfloat16 import to_float32
from pipeline.config.capture import CaptureSettings

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("score_with_vllm.py")
EVERYTHING = {
    "k": 16, "temperatures": [1.0, 2.0, 1.5], "any_temperature": True, "boundary": True,
    "hidden_layers": [-1, 2, 0, 4],
}  # fmt: skip
SCALARS = ("tail_logmass_T", "label_logprob_T", "entropy_T", "log_partition_TC", "tail_shape_T3", "boundary_logmass_T")


def everything(mode):
    """Return capture settings with every signal that the mode has."""
    return EVERYTHING | {"mode": mode, "any_temperature": mode == "topk"}


def hosting(model, calls, *, teacher, spec):
    settings = {"name": "t", "model": str(model), "dtype": "float32", "kv_cache_gib": 0.1}
    rows = [
        [{"name": s.sequence_id, "ids": s.input_ids_N.tolist(), "audited": s.audited} for s in call] for call in calls
    ]
    return {"model": str(model), "teacher": settings | teacher, "spec": spec, "calls": rows}


@pytest.fixture(scope="module")
def hosted(tmp_path_factory, tiny_llama, sequences, five_rows):
    """Results by teacher: the outcome of each call (or of opening), and the signals of every row by (call, row).

    `topk` and `unbiased` prefill 180 tokens in steps of at most 64: the third sequence takes three steps, and the last
    of these holds one token. Chunks of 7 rows cross sequences.
    """
    folder = tmp_path_factory.mktemp("hosted")
    gpt2 = folder / "gpt2"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(gpt2)
    in_chunks = {"max_batched_tokens": 64, "chunk_rows": 7}
    long_and_good = [sequences(20, 129), sequences(60, 90)]
    jobs = {
        "gpt2": hosting(gpt2, [sequences(20, vocabulary=100)], teacher={}, spec={"k": 4, "hidden_layers": [1]}),
        "topk": hosting(tiny_llama.path, [five_rows], teacher=in_chunks, spec=everything("topk")),
        "unbiased": hosting(tiny_llama.path, [five_rows], teacher=in_chunks, spec=everything("unbiased")),
        "bfloat16": hosting(tiny_llama.path, long_and_good, teacher={"dtype": "bfloat16"}, spec={"k": 16}),
        "two ranks": hosting(tiny_llama.path, [five_rows], teacher={"tensor_parallel": 2}, spec=EVERYTHING),
    }
    (folder / "job.json").write_text(json.dumps(jobs))
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, SCRIPT, folder / "job.json", folder],
        capture_output=True, text=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, timeout=500, check=False,
    )  # fmt: skip
    assert all((folder / f"{name}.json").exists() for name in jobs), done.stderr[-3000:]
    signals = {name: {} for name in jobs}
    for path in folder.glob("*.npz"):
        name, call, row = path.stem.split("-")
        signals[name][int(call), int(row)] = np.load(path)
    return {name: (json.loads((folder / f"{name}.json").read_text()), signals[name]) for name in jobs}


@pytest.fixture(scope="module")
def five_rows(sequences):
    return sequences(30, 2, 97, 11, 40, audited=(2,))


def assert_equal_plain_forward(found, rows, model, forward, mode):
    spec, starts = CaptureSettings(**everything(mode)).spec(0), word_starts(model.path, 320)
    for index, row in enumerate(rows):
        got = found[0, index]
        expected = reference_signals(forward.logits(row), row.input_ids_N[1:], spec, row.sequence_id, starts)
        assert got["entry_id_TK"].shape == (len(row.input_ids_N) - 1, 16)
        given = [name for name in SCALARS if getattr(expected, name) is not None]
        assert [name for name in SCALARS if name in got] == given
        for name in given:  # both float32: other kernels, other order of sums
            np.testing.assert_allclose(got[name], getattr(expected, name), atol=2e-4, rtol=1e-4, err_msg=name)
        assert (got["entry_id_TK"] == expected.entry_id_TK).mean() > 0.98
        assert np.isclose(got["entry_logweight_TK"], expected.entry_logweight_TK, atol=2e-4).mean() > 0.98


@pytest.mark.parametrize("mode", ["topk", "unbiased"])
def test_signals_equal_a_plain_float32_forward_through_chunked_prefill(hosted, five_rows, tiny_llama, plain, mode):
    ends, found = hosted[mode]
    assert ends == ["scored"]
    assert_equal_plain_forward(found, five_rows, tiny_llama, plain(tiny_llama.path), mode)


def test_hidden_layers_are_numbered_as_the_contract_defines(hosted, five_rows, tiny_llama, plain):
    found = hosted["topk"][1]
    got, forward = found[0, 2], plain(tiny_llama.path)
    hidden = to_float32(got["hidden_TLD"])
    for column, layer in enumerate((-1, 2, 0)):  # bfloat16 keeps 8 bits: half a unit is 1/256 of the value
        np.testing.assert_allclose(hidden[:, column], forward.hidden(five_rows[2], layer), rtol=1 / 200, atol=1e-3)
    before_norm = hidden[:, 3]  # layer 4 of 4, which transformers gives only after the norm
    normed = before_norm / np.sqrt((before_norm**2).mean(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normed, forward.hidden(five_rows[2], -1), rtol=1 / 50, atol=0.02)
    np.testing.assert_array_equal(got["exact_hidden_TD"], got["hidden_TLD"][:, 0])
    assert "exact_hidden_TD" not in found[0, 1]


def test_two_ranks_give_the_signals_of_one(hosted, five_rows):
    ends, found = hosted["two ranks"]
    assert ends == ["scored"]
    for index in range(len(five_rows)):
        for name in SCALARS:  # sums over two halves of each layer, in float32
            one = hosted["topk"][1][0, index][name]
            np.testing.assert_allclose(found[0, index][name], one, atol=2e-4, rtol=1e-4)


def test_bfloat16_is_within_rounding_error_and_bad_rows_do_not_stop_the_engine(hosted, tiny_llama, plain, sequences):
    ends, found = hosted["bfloat16"]
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


def test_an_architecture_without_eagle3_interface_is_refused_by_name(hosted):
    (refusal,), _ = hosted["gpt2"]
    assert refusal.startswith("ModelError: teacher t: vllm's GPT2LMHeadModel gives no hidden layers but -1, got [1]")
