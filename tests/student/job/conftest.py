"""A small run whose cache a dummy teacher has filled, in this process: all that training needs."""

import json
import multiprocessing
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.config import Recipe, recipe_from
from pipeline.tokenizer import ByteTokenizer
from student.faults import ENVIRONMENT_KEY
from student.job import Told
from student.train import train

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
    """A folder with a corpus and filled caches, and recipes over it."""

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
        return recipe_from(self.values(**changes))

    def job(self, arm="student", **changes) -> Path:
        """A job file, as `stillhouse` writes it."""
        path = self.folder / "job.json"
        path.write_text(json.dumps({"recipe": self.recipe(**changes).resolved(), "student": "student", "arm": arm}))
        return path

    def fill(self, recipe: Recipe, lost_rows: int = 0) -> None:
        """Capture everything; the first teacher loses the first rows of its first unit."""
        self._capture_here(recipe, lost_rows)


def start(told: Told, fault: str = "") -> int | None:
    """The training in a process of its own, forked from this one, which may be to die of a fault; its exit code."""

    def job() -> None:
        os.environ[ENVIRONMENT_KEY] = fault
        torch.set_num_threads(1)
        train(told)

    process = multiprocessing.get_context("fork").Process(target=job)
    process.start()
    process.join(120)
    return process.exitcode


def write_large_teacher(folder, layers=64, width=512):
    """A teacher of zeros that takes no room on the disk; its bytes."""
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
    lines = [
        json.dumps(
            {
                "id": f"d{number}",
                "domain": "odd" if number % 2 else "even",
                "text": " ".join(random_.choices(WORDS, k=8 + number)),
            }
        )
        for number in range(24)
    ]
    (folder / "corpus.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="session")
def filled(tmp_path_factory, capture_here) -> Path:
    """A run with the default teacher's cache; not to be written to."""
    folder = tmp_path_factory.mktemp("filled")
    write_corpus(folder)
    run = SmallRun(folder, capture_here)
    run.fill(run.recipe())
    return folder


@pytest.fixture(scope="session")
def run_in(filled, capture_here) -> Callable[[Path], SmallRun]:
    """Makes a run of one's own in a folder, with the default teacher's cache in it."""

    def make(folder: Path) -> SmallRun:
        shutil.copytree(filled, folder, dirs_exist_ok=True)
        return SmallRun(folder, capture_here)

    return make


@pytest.fixture
def small_run(run_in, tmp_path) -> SmallRun:
    return run_in(tmp_path)


@pytest.fixture
def empty_run(tmp_path, capture_here) -> SmallRun:
    """A corpus, and no cache yet."""
    write_corpus(tmp_path)
    return SmallRun(tmp_path, capture_here)


@pytest.fixture(scope="session", name="start")
def start_fixture() -> Callable[..., int | None]:
    return start
