"""Two real teachers in vLLM, of different architecture and tokenizer, in one run, with one poison row among 200.

The poison is a token that vLLM's own model raises on, in the middle of a step, as a kernel does that meets what it
cannot do. The requests left in vLLM's queues then make the engine useless: it must be replaced, and the row be found.
"""

import json
import random
import re

import pytest
import ray
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from actors.capture import capture
from pipeline.cache import quarantine
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage.store import Store
from pipeline.config import recipe_from_dict
from pipeline.errors import ExitCode

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
POISON = "<poison>"
POISON_ID = 258
"""Behind the 256 bytes and two merges of the first teacher's tokenizer."""


def save(folder, model_class, config_class, merged, *, poison):
    """A tiny random model; with `poison` its tokenizer knows one token more."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [a + b for a, b in merged]
    inner = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merged))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    if poison:
        tokenizer.add_tokens([POISON])
        assert tokenizer.convert_tokens_to_ids(POISON) == POISON_ID
    tokenizer.save_pretrained(folder)
    torch.manual_seed(len(merged))
    model = model_class(config_class(vocab_size=len(tokenizer), tie_word_embeddings=True, **SIZES))
    model.to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def recipe(tmp_path):
    llama = save(tmp_path / "llama", LlamaForCausalLM, LlamaConfig, [("o", "a"), ("e", "r")], poison=True)
    qwen = save(tmp_path / "qwen", Qwen2ForCausalLM, Qwen2Config, [("a", "t"), ("t", "e"), ("y", "e")], poison=False)
    draw = random.Random(5)
    words = ["oak", "water", "yeast", "barley", "copper"]
    texts = [" ".join(draw.choices(words, k=6)) for _ in range(200)]
    texts[77] = f"water {POISON} barley"
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"id": f"d{i}", "text": line}) + "\n" for i, line in enumerate(texts)))
    common = {"engine": "vllm", "kv_cache_gib": 0.1, "max_batched_tokens": 256, "chunk_rows": 128}
    return recipe_from_dict(
        {
            "name": "pair",
            "storage": str(tmp_path / "run"),
            "cluster": {"cpus": 2},
            "corpus": {"source": str(text), "sequence_length": 64, "held_out": 0.1},
            "teachers": [{"name": "llama", "model": llama, **common}, {"name": "qwen", "model": qwen, **common}],
            "capture": {"k": 8, "hidden_layers": [1, -1], "unit_sequences": 4},
        }
    )


def poisoned_workers():
    """A setup hook of Ray workers: the engine, once open, raises on the poison token. Pickled by value."""

    def set_up(poison_id=POISON_ID):
        from actors import engines

        open_engine = engines.open_engine

        def open_poisoned(*arguments):
            engine = open_engine(*arguments)
            from vllm.model_executor.models.llama import LlamaModel

            embed = LlamaModel.embed_input_ids

            def embed_or_raise(model, input_ids):
                if (input_ids == poison_id).any():
                    raise RuntimeError("no kernel for this token")
                return embed(model, input_ids)

            LlamaModel.embed_input_ids = embed_or_raise
            return engine

        engines.open_engine = open_poisoned

    return set_up


@pytest.fixture
def cluster():
    environment = {"worker_process_setup_hook": poisoned_workers()}
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False,
             runtime_env=environment)  # fmt: skip
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_vllm_teachers_share_a_run_and_a_poison_row_costs_only_itself(cluster, recipe, capsys):
    assert capture(recipe, recipe.teachers) is ExitCode.INCOMPLETE
    stores = {teacher.name: Store.open(recipe.cache_uri(teacher.name)) for teacher in recipe.teachers}
    documents = {
        name: {
            row.sequence.document_id for split in ("train", "held_out") for row in CacheReader.open(store).rows(split)
        }
        for name, store in stores.items()
    }
    assert documents["qwen"] == {f"d{i}" for i in range(200)}
    assert documents["llama"] == documents["qwen"] - {"d77"}
    (entry,) = quarantine.entries(stores["llama"])
    assert "vllm: RuntimeError: no kernel for this token" in entry.engine_message
    assert "the engine died 2 times on this row alone" in entry.reason
    assert quarantine.entries(stores["qwen"]) == []
    output = capsys.readouterr().err
    assert output.count(": usable") == 2
    retries = {name: int(count) for name, count in re.findall(r"capture (\w+): .*, (\d+) retries", output)}
    assert retries["llama"] >= 4  # the unit, one of its halves, and the row twice
    assert retries["qwen"] == 0
