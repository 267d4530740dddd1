"""A small run whose cache a dummy teacher has filled, in this process: all that training needs."""

import json
import random
import shutil
from pathlib import Path

import pytest

from actors.engines import open_engine
from actors.rows import score_rows
from pipeline.cache.commit import commit_unit
from pipeline.cache.description import write_teacher
from pipeline.cache.lm_head import write_lm_head
from pipeline.cache.manifest import write_manifest
from pipeline.cache.schema import ShardSpec
from pipeline.cache.units import UnitList
from pipeline.cache.writer import encode_shard
from pipeline.config import Recipe, recipe_from
from pipeline.prepare import prepare_cache

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

    def __init__(self, folder: Path) -> None:
        self.folder = folder

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
        for number, teacher in enumerate(recipe.teachers):
            cache = prepare_cache(recipe, teacher)
            engine = open_engine(teacher, cache.model, recipe.capture.spec(recipe.seed))
            shard = ShardSpec.of(recipe.capture.spec(recipe.seed), engine.describe())
            write_teacher(cache.store, engine.describe(), shard)
            write_lm_head(cache.store, engine.lm_head())
            units = UnitList.open(cache.store)
            for unit_id in cache.unit_ids:
                rows, _ = score_rows(engine, units.read(unit_id).sequences)
                lost = lost_rows if (number, unit_id) == (0, cache.unit_ids[0]) else 0
                names = [row.sequence.sequence_id for row in rows[:lost]]
                commit_unit(cache.store, unit_id, encode_shard(rows[lost:], shard), rows[lost:], names)
            write_manifest(cache.store)


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
def filled(tmp_path_factory) -> Path:
    """A run with the default teacher's cache; not to be written to."""
    folder = tmp_path_factory.mktemp("filled")
    write_corpus(folder)
    run = SmallRun(folder)
    run.fill(run.recipe())
    return folder


@pytest.fixture
def small_run(filled, tmp_path) -> SmallRun:
    """A run of one's own, with the default teacher's cache in it."""
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    return SmallRun(tmp_path)


@pytest.fixture
def empty_run(tmp_path) -> SmallRun:
    """A corpus, and no cache yet."""
    write_corpus(tmp_path)
    return SmallRun(tmp_path)
