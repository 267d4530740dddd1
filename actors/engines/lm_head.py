"""Reads the LM head from a model's safetensors files, for the exact distributions of audited sequences."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from pipeline.contracts import LmHead
from pipeline.models.causal_lm import head_scale_and_cap
from pipeline.models.folders import ModelFolder

_HEADS = ("lm_head.weight", "output.weight", "embed_out.weight")
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)
_UNKNOWN_HEADS = (
    "quantization_config",
    "dim_model_base",
    "lm_head_multiplier",
    "output_multiplier",
    "mup_width_multiplier",
)
"""Config keys of models whose head is more than matrix, bias, scale and soft cap, or is stored quantised."""


def read_lm_head(model: ModelFolder) -> LmHead | None:
    """Return the stored head, rounded to bfloat16, or None (see `why_no_lm_head`)."""
    if why_no_lm_head(model) is not None:
        return None
    files = _files_by_tensor(model.path)
    name = _head_name(model, files)
    if name is None:
        return None
    scale, cap = head_scale_and_cap(model.text_config)
    bias = name.removesuffix("weight") + "bias"
    return LmHead(
        weight_VD=_read(files[name], name).bfloat16().contiguous().view(torch.uint16).numpy(),
        bias_V=_read(files[bias], bias).float().numpy() if bias in files and name.endswith(_HEADS) else None,
        scale=scale,
        soft_cap=cap,
    )


def why_no_lm_head(model: ModelFolder, quantization: str | None = None) -> str | None:
    """Return why a cache of this teacher has no LM head, which `evaluate` needs, or None if it has one."""
    if quantization is not None:
        return f"its weights are quantised ({quantization})"
    for key in _UNKNOWN_HEADS:
        if model.text_config.get(key) or model.config.get(key):
            return f"its config has {key}"
    return None if _head_name(model, _files_by_tensor(model.path)) else "its files hold no matrix of that kind"


def _head_name(model: ModelFolder, files: dict[str, Path]) -> str | None:
    tied = model.text_config.get("tie_word_embeddings", model.config.get("tie_word_embeddings", False))
    return _only_match(files, _HEADS) or (_only_match(files, _EMBEDDINGS) if tied else None)


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    by_tensor = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            by_tensor.update(dict.fromkeys(file.keys(), path))
    return by_tensor


def _only_match(names: dict[str, Path], endings: tuple[str, ...]) -> str | None:
    matching = [name for name in names if name.endswith(endings)]
    return matching[0] if len(matching) == 1 else None


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor
