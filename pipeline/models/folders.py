"""Model folders: a shipped model's name, a local folder or a hub id with its revision as a checked local folder.

A model folder contains `config.json`, safetensors and tokenizer files. Pickles and remote code are refused.
"""

import contextlib
import json
import os
import re
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
"""Keys of a config that describe how it was saved. They are left out of the digest."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A checked local folder of a model."""

    path: Path
    reference: str
    """The model's name, folder or hub id in the recipe."""
    revision: str | None
    digest: str
    """sha256 over weights and config, except the keys that describe how the config was saved."""
    tokenizer_digest: str
    """sha256 over what determines a text's token ids."""
    config: dict[str, Any] = field(repr=False)

    @property
    def text_config(self) -> dict[str, Any]:
        """Config of the language model, which multimodal models nest as `text_config`."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def positions(self) -> int | None:
        """Maximum position embeddings; None if the config has no such key."""
        config = self.text_config
        positions = config.get("max_position_embeddings", config.get("n_positions"))
        return positions if isinstance(positions, int) else None


def stillhouse_home() -> Path:
    """Return the folder of shipped models and digests: `$STILLHOUSE_HOME`, by default `~/.cache/stillhouse`."""
    return Path(os.environ.get("STILLHOUSE_HOME") or Path.home() / ".cache" / "stillhouse").expanduser().absolute()


def resolve_model(reference: str, *, revision: str | None = None) -> ModelFolder:
    """Return a model's folder, checked and with digests. Downloads a shipped model or hub id. Raises ModelError."""
    path = _locate(reference, revision)
    check_model_folder(path)
    return ModelFolder(
        path=path,
        reference=reference,
        revision=revision,
        digest=_model_digest(path),
        tokenizer_digest=tokenizer_digest(path),
        config=_read_json(path / "config.json"),
    )


def find_local_model(reference: str, *, revision: str | None = None) -> ModelFolder | None:
    """Return `resolve_model` without downloading: None for a missing or invalid model, and for every hub id."""
    folder = Path(reference).expanduser()
    if reference in SHIPPED:
        is_local = is_installed(stillhouse_home() / "models" / reference)
        return resolve_model(reference, revision=revision) if is_local else None
    try:
        return resolve_model(str(folder)) if folder.is_dir() else None
    except ModelError:
        return None


def check_model_folder(path: Path) -> None:
    """Raise ModelError unless the folder has a config and complete safetensors, and its configs have no `auto_map`."""
    if not path.is_dir():
        raise ModelError(f"model {path}: no such folder")
    if not (path / "config.json").is_file():
        raise ModelError(f"model {path}: expected a config.json, got none")
    _check_weights(path)
    for name in _CONFIGS:
        if (path / name).is_file() and _has_auto_map(_read_json(path / name)):
            raise ModelError(f"model {path}: {name} has auto_map, which requires remote code: refused")


def tokenizer_digest(folder: Path) -> str:
    """Return `digest_tokenizer_files` of a folder. Raises ModelError if a file cannot be read."""
    try:
        return digest_tokenizer_files(tokenizer_files(folder))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"tokenizer {folder}: cannot be read: {' '.join(str(error).split())}") from error


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Return the contents of a folder's tokenizer files by name. Raises OSError."""
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def _locate(reference: str, revision: str | None) -> Path:
    folder = Path(reference).expanduser()
    is_hub_id = reference not in SHIPPED and not folder.is_dir() and _HUB_ID.fullmatch(reference) is not None
    if revision is not None and not is_hub_id:
        raise ModelError(f"model {reference}: only a hub id has a revision, got {revision}")
    if reference in SHIPPED:
        return install(SHIPPED[reference], stillhouse_home() / "models")
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
        with heartbeat(f"model {reference}: downloading"):
            return Path(snapshot_download(reference, revision=revision, allow_patterns=_HUB_PATTERNS))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"model {reference}@{revision[:12]}: cannot be downloaded from the hub: {reason}") from error


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
            raise ModelError(f"model {path}: {index.name} names {missing[0]}, which is missing")


def _model_digest(path: Path) -> str:
    config = {key: value for key, value in _read_json(path / "config.json").items() if key not in _CONFIG_NOTES}
    weights = {file.name: _cached_sha256(file) for file in sorted(path.glob("*.safetensors"))}
    return fingerprint({"config": config, "weights": weights})


def _cached_sha256(file: Path) -> str:
    """Return the file's sha256, cached by path, size and modification time: weights may be hundreds of GB."""
    real = file.resolve()
    stat = real.stat()
    state = f"{real}\0{stat.st_size}\0{stat.st_mtime_ns}"
    cached = stillhouse_home() / "digests" / sha256_bytes(state.encode())
    try:
        return cached.read_text()
    except OSError:
        digest = sha256_file(real)
    with contextlib.suppress(OSError):  # without a writable home, the digest is computed each time
        cached.parent.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_suffix(f".{os.getpid()}")
        temporary.write_text(digest)
        temporary.replace(cached)
    return digest


def _has_auto_map(value: Any) -> bool:
    if isinstance(value, dict):
        return "auto_map" in value or any(_has_auto_map(item) for item in value.values())
    return isinstance(value, list) and any(_has_auto_map(item) for item in value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"model {path.parent}: {path.name} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ModelError(f"model {path.parent}: {path.name}: expected an object, got {type(value).__name__}")
    return value
