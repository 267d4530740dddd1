"""Two real teachers in vLLM, of different architecture and tokenizer, in one run, with one poison row among 200."""

import json
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from actors.capture import capture
from pipeline.cache import quarantine
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage import Store
from pipeline.config import recipe_from
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


def save(folder, model_class, config_class, merged, *, poison):
    """A tiny random model; with `poison` its tokenizer knows a token that the model has no row for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [a + b for a, b in merged]
    inner = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merged))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    if poison:
        tokenizer.add_tokens([POISON])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(len(merged))
    model = model_class(config_class(vocab_size=len(pieces), tie_word_embeddings=True, **SIZES))
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
    return recipe_from(
        {
            "name": "pair",
            "storage": str(tmp_path / "run"),
            "cluster": {"cpus": 2},
            "corpus": {"source": str(text), "sequence_length": 64, "held_out": 0.1},
            "teachers": [{"name": "llama", "model": llama, **common}, {"name": "qwen", "model": qwen, **common}],
            "capture": {"k": 8, "hidden_layers": [1, -1], "unit_sequences": 16},
        }
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_vllm_teachers_share_a_run_and_a_poison_row_costs_only_itself(recipe, capsys):
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
    assert "token ids" in entry.engine_message
    assert quarantine.entries(stores["qwen"]) == []
    assert capsys.readouterr().out.count(": usable") == 2
