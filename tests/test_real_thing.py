"""The main job with nothing replaced: a tiny random Llama in real vLLM, a real Ray actor, real shards, two workers of
Ray Train, and the exported folder opened by transformers and by vLLM in fresh processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.models.dtype import preferred_dtype

RECIPE = {
    "name": "real",
    "storage": "run",
    "cluster": {"cpus": 2},
    "corpus": {"source": "text.jsonl", "sequence_length": 64, "held_out": 0.25},
    "teachers": [
        {"name": "tiny", "model": "teacher", "engine": "vllm", "kv_cache_gib": 0.1, "max_batched_tokens": 256,
         "chunk_rows": 128}
    ],
    "capture": {"k": 16, "hidden_layers": [3, -1], "unit_sequences": 4},
    "student": {"name": "student", "from_teacher": "tiny", "layers": [0, 3]},
    "training": {"workers": 2, "tokens_per_step": 256, "tokens_per_batch": 128, "max_steps": 4,
                 "losses": {"kd": 0.6, "ce": 0.4, "feature": 0.1}, "feature": {"layer_gap_least_squares": True}},
    "evaluation": {"control": "none"},
}  # fmt: skip
WITH_TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True)
ids = AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True)("a still house", return_tensors="pt").input_ids
with torch.no_grad():
    print(model.config.num_hidden_layers, model(ids).logits.isfinite().all().item(), model.dtype)
"""
WITH_VLLM = """
import os, sys
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1")
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=128)
print(len(llm.generate("a still house", SamplingParams(max_tokens=5, ignore_eos=True))[0].outputs[0].token_ids))
"""


def make_teacher(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate([*alphabet, "<end>"])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=len(alphabet) + 1, num_hidden_layers=4, max_position_embeddings=128, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def fresh(script: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_main_job_with_nothing_replaced(tmp_path: Path) -> None:
    make_teacher(tmp_path / "teacher")
    lines = [{"id": f"d{i}", "text": f"Barley {i} waits in the still house. " * 6} for i in range(16)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "real.yaml").write_text(yaml.safe_dump(RECIPE))
    command = [sys.executable, "-m", "pipeline.run.cli", "run", "real.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=560)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["results"]["teacher"]["kl_to_teacher"] == pytest.approx(0.0, abs=1e-3)
    assert 0.0 < report["results"]["student"]["kl_to_teacher"] < 5.0
    trained = json.loads((tmp_path / "run/students/student/train.json").read_text())
    for rank in trained["ranks"]:
        assert rank["modules"] == ["ray", "torch", "transformers"]
    exported = tmp_path / "run/export/student"
    assert fresh(WITH_TRANSFORMERS, exported) == f"2 True torch.{preferred_dtype()}"
    assert fresh(WITH_VLLM, exported) == "5"
