"""Tiny random teachers, and reference outputs of transformers in float32."""

import numpy as np
import pytest
import ray
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.contracts import TokenSequence
from pipeline.models.folders import resolve_model

VOCABULARY = 320


def save_tokenizer(folder, vocabulary=VOCABULARY):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [f"\u0120w{i}" for i in range(vocabulary - len(alphabet) - 1)] + ["<end>"]
    inner = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(folder)


def save_llama(folder, *, tied=True, dtype=torch.float32, seed=0, **changes):
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(sizes | changes), tie_word_embeddings=tied))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)  # far from uniform: entropies between 1 and 5 nats
    model.to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return resolve_model(str(folder))


def sequences_of(*lengths, vocabulary=VOCABULARY, audited=()):
    made = []
    for i, length in enumerate(lengths):
        ids = np.random.default_rng(i).integers(0, vocabulary, length).astype(np.int32)
        made.append(
            TokenSequence(f"s{i}", f"d{i}", None, "train", ids, np.ones(length, np.uint8),
                          np.arange(1, length + 1, dtype=np.int32), audited=i in audited)
        )  # fmt: skip
    return made


class PlainForward:
    """The model in float32 with transformers alone, one sequence at a time."""

    def __init__(self, folder):
        self._model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(self, sequence):
        return self._run(sequence).logits[0, :-1].double().numpy()

    @torch.no_grad()
    def hidden(self, sequence, layer):
        """Layer i of transformers' list; its last is after the final norm, which is layer -1 here."""
        states = self._run(sequence).hidden_states
        assert layer == -1 or layer < len(states) - 1
        return states[layer][0, :-1].numpy()

    def _run(self, sequence):
        ids = torch.from_numpy(sequence.input_ids_N.astype(np.int64))[None]
        return self._model(ids, output_hidden_states=True)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def plain():
    return PlainForward


@pytest.fixture(scope="session")
def sequences():
    return sequences_of


@pytest.fixture(scope="module")
def two_cpus_of_ray():
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()
