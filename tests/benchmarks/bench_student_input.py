"""Measures the share of a training's time spent waiting for input, with a cache on the local disk.

The corpus is random words and the teacher is the dummy engine, so nothing is downloaded. The student is small (4 layers
of width 256), so the share is larger than with a real student.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY, STEP_TOKENS, STEPS = 1024, 512, 12
STUDENT = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip


def training_record(device: str, threads: int) -> dict[str, Any]:
    """Train and return the record; `input_wait_share` leaves out the first step, where the reader starts."""
    with tempfile.TemporaryDirectory(prefix="stillhouse-bench-") as temporary:
        folder = Path(temporary)
        recipe = _recipe(folder, device).to_dict()
        _job("actors.capture", {"recipe": recipe, "teacher": None}, folder, threads)
        _job("student.train", {"recipe": recipe, "student": "student", "arm": "student"}, folder, threads)
        timing = Path(folder, "run", "students", "student", "timing.jsonl")
        steps = [json.loads(line) for line in timing.read_text().splitlines()]
    return {
        "variant": "training",
        "vocabulary": VOCABULARY,
        "tokens": STEP_TOKENS,
        "seconds": round(min(step["seconds"] for step in steps[1:]), 4),
        "peak_bytes": max(step["memory_bytes"] for step in steps),
        "device": device,
        "dtype": "float32",
        "input_wait_share": wait_share(steps),
    }


def wait_share(steps: list[dict[str, Any]]) -> float:
    """Return the share of time spent waiting for input, from timing.jsonl's lines without the first."""
    waited_s = sum(step["seconds"] * step["input_wait_share"] for step in steps[1:])
    return float(waited_s / max(sum(step["seconds"] for step in steps[1:]), 1e-9))


def _recipe(folder: Path, device: str) -> Any:
    from pipeline.config import recipe_from_dict

    words = [f"{a}{b}" for a in ("shard", "token", "row", "head", "queue") for b in ("s", "ing", "ed", " of", " in")]
    draw = random.Random(0)
    documents = ({"id": str(n), "text": " ".join(draw.choices(words, k=100))} for n in range(STEPS))
    (folder / "text.jsonl").write_text("\n".join(json.dumps(document) for document in documents))
    options = {"vocabulary": VOCABULARY, "width": 64}
    values = {
        "name": "bench",
        "storage": str(folder / "run"),
        "corpus": {"source": str(folder / "text.jsonl"), "sequence_length": 256, "held_out": 0.0},
        "teachers": [{"name": "dummy", "model": "dummy", "engine": "dummy", "options": options}],
        "capture": {"k": 64, "hidden_layers": [-1], "unit_sequences": 8},
        "student": {"config": STUDENT},
        "training": {
            "workers": 0 if device == "cpu" else 1,
            "gpus_per_worker": 0.0 if device == "cpu" else 1.0,
            "tokens_per_step": STEP_TOKENS,
            "tokens_per_batch": STEP_TOKENS,
            "max_steps": STEPS,
            "losses": {"kd": 0.6, "ce": 0.4, "feature": 0.1},
        },
    }
    return recipe_from_dict(values)


def _job(module: str, job: dict[str, Any], folder: Path, threads: int) -> None:
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", module, str(path)], env=environment, stdout=subprocess.DEVNULL, check=True)
