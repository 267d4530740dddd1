"""Random targets with a dense float64 reference, and a small run with the cache of a dummy teacher."""

import json
import multiprocessing
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config import Recipe, recipe_from_dict
from pipeline.contracts import TargetMode
from pipeline.models.tokenizers import ByteTokenizer
from student.data.targets import Targets
from student.loop.fault_points import ENVIRONMENT_KEY
from student.train import train
from student.training_job import TrainingJob

torch.set_num_threads(1)


@dataclass(frozen=True)
class Case:
    """A teacher's full distribution, its top-k targets, and an LM head of the student."""

    teacher_logprob_TV: Tensor
    targets: Targets
    hidden_TD: Tensor
    weight_VD: Tensor
    bias_V: Tensor


def make_case(
    rows: int = 7, vocabulary: int = 23, width: int = 5, k: int = 4, seed: int = 0, temperature: float = 1.0
) -> Case:
    """Top-k targets of a random teacher, float64, with a padded row and rows of weight 0."""
    g = torch.Generator().manual_seed(seed)
    logprob_TV = torch.log_softmax(3.0 * torch.randn(rows, vocabulary, generator=g, dtype=torch.float64), dim=1)
    logweight_TK, id_TK = logprob_TV.topk(k, dim=1)
    kept_TV = torch.zeros(rows, vocabulary, dtype=torch.bool).scatter_(1, id_TK, True)
    if k > 1:
        kept_TV[0, id_TK[0, -1]] = False
        logweight_TK[0, -1], id_TK[0, -1] = -torch.inf, 0
    tail_T = logprob_TV.masked_fill(kept_TV, -torch.inf).logsumexp(dim=1)
    label_T = torch.randint(vocabulary, (rows,), generator=g)
    weight_T = torch.rand(rows, generator=g, dtype=torch.float64) + 0.5
    weight_T[rows // 2] = 0.0
    targets = Targets(
        label_T=label_T,
        weight_T=weight_T,
        entry_id_TK=id_TK,
        entry_logweight_TK=logweight_TK,
        tail_logmass_T=tail_T,
        teacher_label_logprob_T=logprob_TV.gather(1, label_T[:, None]).squeeze(1),
        teacher_entropy_T=-(logprob_TV.exp() * logprob_TV).sum(dim=1),
        log_partition_T=None if temperature == 1.0 else torch.logsumexp(logprob_TV / temperature, dim=1),
        mode=TargetMode.TOPK,
    )
    hidden_TD = torch.randn(rows, width, generator=g, dtype=torch.float64)
    weight_VD = torch.randn(vocabulary, width, generator=g, dtype=torch.float64)
    return Case(logprob_TV, targets, hidden_TD, weight_VD, torch.randn(vocabulary, generator=g, dtype=torch.float64))


@pytest.fixture(scope="session")
def new_case() -> Callable[..., Case]:
    return make_case


CaptureHere = Callable[[Recipe, int], None]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "attention_dropout": 0.1,
}
TRAINING = {
    "workers": 0,
    "tokens_per_step": 256,
    "tokens_per_batch": 96,
    "learning_rate": 3e-3,
    "checkpoint_every_steps": 3,
    "losses": {"kd": 0.6, "ce": 0.4, "feature": 0.1},
}
DUMMY = {"name": "dummy", "model": "dummy", "engine": "dummy", "options": {"vocabulary": 300, "width": 16}}
WORDS = ("shard", "teacher", "entropy", "of", "the", "a", "queue", "window", "merge", "actor", "tensor", "holds")


class SmallRun:
    """A folder with a corpus and its caches, and recipes for it."""

    def __init__(self, folder: Path, capture_here: CaptureHere) -> None:
        self.folder, self._capture_here = folder, capture_here

    def values(self, *, teachers=(DUMMY,), capture=None, student=None, **training):
        corpus = {"source": str(self.folder / "corpus.jsonl"), "sequence_length": 48, "held_out": 0.2}
        return {
            "name": "small",
            "storage": str(self.folder / "run"),
            "seed": 7,
            "corpus": corpus,
            "teachers": list(teachers),
            "capture": {"k": 8, "hidden_layers": [2, -1], "unit_sequences": 4, **(capture or {})},
            "student": student or {"config": LLAMA},
            "training": TRAINING | training,
        }

    def recipe(self, **changes) -> Recipe:
        return recipe_from_dict(self.values(**changes))

    def job_file(self, arm="student", **changes) -> Path:
        """Write a job file as `stillhouse` does; returns its path."""
        path = self.folder / "job.json"
        path.write_text(json.dumps({"recipe": self.recipe(**changes).to_dict(), "student": "student", "arm": arm}))
        return path

    def fill(self, recipe: Recipe, lost_rows: int = 0) -> None:
        """Capture all teachers; the first one quarantines the first `lost_rows` rows of its first unit."""
        self._capture_here(recipe, lost_rows)


def start(job: TrainingJob, fault: str = "") -> int | None:
    """Train in a forked process, which an injected fault may kill; returns its exit code."""

    def work() -> None:
        os.environ[ENVIRONMENT_KEY] = fault
        torch.set_num_threads(1)
        train(job)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    return process.exitcode


def write_large_teacher(folder, layers=64, width=512):
    """Write a teacher of zeros as a sparse file; returns the bytes of its tensors."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "vocab_size": 300, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": True}
    folder.mkdir()
    config = LlamaConfig(**sizes, **heads, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    for name, data in ByteTokenizer().files().items():
        (folder / name).write_bytes(data)
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        if name != "lm_head.weight":
            offsets = [end, end := end + tensor.nbytes]
            header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def write_corpus(folder: Path) -> None:
    random_ = random.Random(0)
    lines = []
    for number in range(24):
        text = " ".join(random_.choices(WORDS, k=8 + number))
        lines.append(json.dumps({"id": f"d{number}", "domain": "odd" if number % 2 else "even", "text": text}))
    (folder / "corpus.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="session")
def filled(tmp_path_factory, capture_here) -> Path:
    """A run with the default teacher's cache. Read only: all tests share it."""
    folder = tmp_path_factory.mktemp("filled")
    write_corpus(folder)
    run = SmallRun(folder, capture_here)
    run.fill(run.recipe())
    return folder


@pytest.fixture(scope="session")
def run_in(filled, capture_here) -> Callable[[Path], SmallRun]:
    """Return a function that copies the run with the default teacher's cache to a folder."""

    def make(folder: Path) -> SmallRun:
        shutil.copytree(filled, folder, dirs_exist_ok=True)
        return SmallRun(folder, capture_here)

    return make


@pytest.fixture
def small_run(run_in, tmp_path) -> SmallRun:
    return run_in(tmp_path)


@pytest.fixture
def empty_run(tmp_path, capture_here) -> SmallRun:
    """A run with a corpus and no cache."""
    write_corpus(tmp_path)
    return SmallRun(tmp_path, capture_here)


@pytest.fixture(scope="session", name="start")
def start_fixture() -> Callable[..., int | None]:
    return start
