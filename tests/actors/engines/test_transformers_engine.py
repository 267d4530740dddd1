import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from actors.engines import open_engine
from actors.engines.word_starts import word_starts
from actors.signals.reference import reference_signals
from pipeline.bfloat16 import to_float32
from pipeline.config.capture import TeacherSpec
from pipeline.contracts import CaptureSpec, TargetMode
from pipeline.errors import ModelError, RecipeError, RowError
from pipeline.models.folders import resolve_model


def teacher(model, **changes):
    settings = {"engine": "transformers", "dtype": "float32", "max_batched_tokens": 64, "chunk_rows": 10}
    return TeacherSpec(name="t", model=str(model.path), **(settings | changes))


def everything(mode):
    return CaptureSpec(
        mode=mode, k=16, draws=16, temperatures=(1.0, 2.0, 1.5), any_temperature=True, boundary=True,
        hidden_layers=(0, 2, -1),
    )  # fmt: skip


def assert_signals(got, expected, atol):
    for name in ("tail_logmass_T", "label_logprob_T", "entropy_T", "log_partition_TC", "tail_shape_T3",
                 "boundary_logmass_T", "entry_logweight_TK"):  # fmt: skip
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), atol=atol, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("mode", [TargetMode.TOPK, TargetMode.TOPP, TargetMode.UNBIASED, TargetMode.SAMPLED])
def test_signals_equal_a_plain_float32_forward(tiny_llama, plain, sequences, mode):
    spec = everything(mode)
    rows = sequences(30, 2, 75, 11, audited=(2,))
    got = open_engine(teacher(tiny_llama), tiny_llama, spec).score(rows)
    forward, starts = plain(tiny_llama.path), word_starts(tiny_llama.path, 320)
    for sequence, signals in zip(rows, got, strict=True):
        expected = reference_signals(
            forward.logits(sequence), sequence.input_ids_N[1:], spec, sequence.sequence_id, starts
        )
        assert_signals(signals, expected, 2e-4)  # both float32, other batch shapes
        assert (signals.entry_id_TK == expected.entry_id_TK).mean() > 0.99


def test_hidden_layers_are_numbered_as_the_contract_defines(tiny_llama, plain, sequences):
    spec = CaptureSpec(k=4, hidden_layers=(-1, 3, 0, 4))
    (row,) = rows = sequences(20, audited=(0,))
    (signals,) = open_engine(teacher(tiny_llama), tiny_llama, spec).score(rows)
    forward = plain(tiny_llama.path)
    for column, layer in enumerate((-1, 3, 0)):
        expected = forward.hidden(row, layer)
        np.testing.assert_allclose(to_float32(signals.hidden_TLD[:, column]), expected, rtol=1 / 128, atol=1e-4)
    np.testing.assert_array_equal(signals.exact_hidden_TD, signals.hidden_TLD[:, 0])
    before_norm = to_float32(signals.hidden_TLD[:, 3])
    normed = before_norm / np.sqrt((before_norm**2).mean(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normed, forward.hidden(row, -1), rtol=1 / 50, atol=0.02)


def test_lm_head_times_exact_hidden_equals_the_logits(tiny_llama, plain, sequences):
    engine = open_engine(teacher(tiny_llama), tiny_llama, CaptureSpec(k=4))
    (row,) = rows = sequences(20, audited=(0,))
    state = to_float32(engine.score(rows)[0].exact_hidden_TD)
    logits = state @ to_float32(engine.lm_head().weight_VD).T
    np.testing.assert_allclose(logits, plain(tiny_llama.path).logits(row), atol=0.1)  # both sides rounded to bfloat16


def test_signals_do_not_depend_on_the_batch(tiny_llama, sequences):
    rows = sequences(9, 40, 3, 21)
    engine = open_engine(teacher(tiny_llama), tiny_llama, CaptureSpec(k=8))
    one_by_one = [engine.score([row])[0] for row in rows]
    for together, alone in zip(engine.score(rows), one_by_one, strict=True):
        np.testing.assert_allclose(together.entropy_T, alone.entropy_T, atol=1e-4)
        assert together.entry_id_TK.shape == alone.entry_id_TK.shape


def save_gpt2(folder):
    config = GPT2Config(vocab_size=100, n_embd=32, n_layer=3, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)


def save_gemma2(folder):
    config = Gemma2Config(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=3.0, max_position_embeddings=64,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    model.model.embed_tokens.weight.data.mul_(30.0)  # large enough for the soft cap to matter
    model.save_pretrained(folder)


@pytest.mark.parametrize("save", [save_gpt2, save_gemma2])
def test_other_architectures_equal_their_own_forward_pass(tmp_path, plain, sequences, save):
    torch.manual_seed(0)
    save(tmp_path)
    model, spec = resolve_model(str(tmp_path)), CaptureSpec(k=8, hidden_layers=(0, 1))
    engine = open_engine(teacher(model), model, spec)
    (row,) = rows = sequences(20, vocabulary=100)
    (signals,) = engine.score(rows)
    forward = plain(tmp_path)
    expected = reference_signals(forward.logits(row), row.input_ids_N[1:], spec, row.sequence_id)
    np.testing.assert_allclose(signals.label_logprob_T, expected.label_logprob_T, atol=1e-4)
    for column, layer in enumerate((0, 1)):
        np.testing.assert_allclose(
            to_float32(signals.hidden_TLD[:, column]), forward.hidden(row, layer), rtol=1 / 128, atol=1e-4
        )
    assert (engine.lm_head().soft_cap is None) == (save is save_gpt2)


def test_specs_models_and_rows_that_do_not_fit_are_refused(tiny_llama, sequences):
    with pytest.raises(RecipeError, match=r"hidden_layers: expected 0..4 or -1"):
        open_engine(teacher(tiny_llama), tiny_llama, CaptureSpec(k=4, hidden_layers=(5,)))
    with pytest.raises(RecipeError, match=r"capture.k: expected 1..V-1 \(V=320"):
        open_engine(teacher(tiny_llama), tiny_llama, CaptureSpec(k=320))
    with pytest.raises(ModelError, match="quantization fp8 needs engine vllm"):
        open_engine(teacher(tiny_llama, quantization="fp8"), tiny_llama, CaptureSpec(k=4))
    with pytest.raises(ModelError, match="expected a model folder"):
        open_engine(teacher(tiny_llama), None, CaptureSpec(k=4))
    engine = open_engine(teacher(tiny_llama), tiny_llama, CaptureSpec(k=4))
    with pytest.raises(RowError, match="at most 128 tokens, got 200"):
        engine.score(sequences(10, 200))


def test_nan_logits_raise_a_row_error(tiny_llama, sequences):
    engine = open_engine(teacher(tiny_llama), tiny_llama, CaptureSpec(k=4))
    engine._model.model.embed_tokens.weight.data[7] = torch.nan
    rows = sequences(20)
    rows[0].input_ids_N[5] = 7
    with pytest.raises(RowError, match=r"nan or \+inf"):
        engine.score(rows)
