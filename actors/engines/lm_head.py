"""The LM head out of a model's own files: the matrix that turns the exact hidden state into the whole distribution."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from pipeline.contracts import LmHead

if TYPE_CHECKING:
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
"""Config keys of models whose head does more than a matrix, a bias, a scale and a cap, or is not stored plainly."""


def read_lm_head(model: "ModelFolder") -> LmHead | None:
    """The head as stored, rounded to bfloat16; None where the config says that it does more than `LmHead` can."""
    if why_no_lm_head(model) is not None:
        return None
    files = _files_by_tensor(model.path)
    name = _head_name(model, files)
    if name is None:
        return None
    scale, cap = head_scale_and_cap(model)
    bias = name.removesuffix("weight") + "bias"
    return LmHead(
        weight_VD=_read(files[name], name).bfloat16().contiguous().view(torch.uint16).numpy(),
        bias_V=_read(files[bias], bias).float().numpy() if bias in files and name.endswith(_HEADS) else None,
        scale=scale,
        soft_cap=cap,
    )


def why_no_lm_head(model: "ModelFolder", quantization: str | None = None) -> str | None:
    """Why a cache of this teacher will hold no LM head, which measuring a student takes; None where it will."""
    if quantization is not None:
        return f"its weights are quantised ({quantization})"
    for key in _UNKNOWN_HEADS:
        if model.text_config.get(key) or model.config.get(key):
            return f"its config has {key}"
    return None if _head_name(model, _files_by_tensor(model.path)) else "its files hold no matrix of that kind"


def _head_name(model: "ModelFolder", files: dict[str, Path]) -> str | None:
    tied = model.text_config.get("tie_word_embeddings", model.config.get("tie_word_embeddings", False))
    return _only(files, _HEADS) or (_only(files, _EMBEDDINGS) if tied else None)


def head_scale_and_cap(model: "ModelFolder") -> tuple[float, float | None]:
    """What is done to the head's output: Cohere multiplies its logits, Granite divides them, Gemma 2 caps them."""
    config = model.text_config
    scale = float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
    cap = config.get("final_logit_softcapping")
    return scale, None if cap is None else float(cap)


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


def _only(names: dict[str, Path], endings: tuple[str, ...]) -> str | None:
    matching = [name for name in names if name.endswith(endings)]
    return matching[0] if len(matching) == 1 else None


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor
