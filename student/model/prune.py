"""Depth pruning: copy chosen layers of a teacher's checkpoint into a smaller checkpoint, tensor by tensor.

The teacher's model is never built: its safetensors files are memory-mapped, and the kept tensors are written with their
layers renumbered, so memory stays at the size of one shard.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from pipeline.errors import ModelError, RecipeError

SHARD_BYTES = 2 << 30
"""Size at which an output shard is written."""

_LAYER_KEY = re.compile(r"^(?P<before>(?:(?!\d+\.)[^.]+\.)*)(?P<layer>\d+)(?P<after>\..*)$")
"""Name of a layer's tensor: its first numeric part is the layer number."""


def evenly_spaced_layers(kept: int, layers: int) -> tuple[int, ...]:
    """Return `kept` evenly spaced numbers in 0..layers-1, with both ends (only 0 for one).

    Raises RecipeError unless 1 <= kept <= layers.
    """
    if not 1 <= kept <= layers:
        raise RecipeError(f"student.layers: expected 1..{layers} (the teacher's layers), got {kept}")
    if kept == 1:
        return (0,)
    return tuple((2 * i * (layers - 1) + kept - 1) // (2 * (kept - 1)) for i in range(kept))


def resolve_layers(requested: int | Sequence[int], layers: int) -> tuple[int, ...]:
    """Return the layer numbers for a recipe's `student.layers`: a count or a list. Raises RecipeError."""
    if isinstance(requested, int):
        return evenly_spaced_layers(requested, layers)
    chosen = tuple(requested)
    if not chosen or list(chosen) != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < layers:
        raise RecipeError(f"student.layers: expected increasing layer numbers in 0..{layers - 1}, got {list(chosen)}")
    return chosen


def prune_config(config: PretrainedConfig, keep: Sequence[int]) -> PretrainedConfig:
    """Return the config for the layers `keep` alone; lists with one item per layer are pruned too."""
    layers: int = config.num_hidden_layers
    values: dict[str, Any] = config.to_dict()
    depth_key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    for key, value in values.items():
        if isinstance(value, list) and len(value) == layers:
            values[key] = [value[layer] for layer in keep]
    values[depth_key] = len(keep)
    pruned: PretrainedConfig = type(config).from_dict(values)
    return pruned


def prune_checkpoint(source: Path, keep: Sequence[int], target: Path) -> None:
    """Write the model of folder `source` with only the layers `keep`, in that order, to folder `target`.

    Raises ModelError if a kept layer has no tensors.
    """
    config = AutoConfig.from_pretrained(source)
    prune_config(config, keep).save_pretrained(target)
    if (source / "generation_config.json").exists():
        GenerationConfig.from_pretrained(source).save_pretrained(target)
    weight_map: dict[str, str] = {}
    written: set[int] = set()
    for shard, tensors in enumerate(_shards(_kept_tensors(source, keep, written))):
        name = f"model-{shard:05d}.safetensors"
        save_file(tensors, target / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    missing = sorted(set(range(len(keep))) - written)
    if missing:
        raise ModelError(
            f"model {source}: expected tensors of layers {[keep[i] for i in missing]}, got none of that number; "
            "start the student from a checkpoint or a config"
        )
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


def _kept_tensors(source: Path, keep: Sequence[int], written: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors under their new names; adds each new layer number to `written`."""
    new_number = {layer: position for position, layer in enumerate(keep)}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                in_layer = _LAYER_KEY.match(key)
                if in_layer is None:
                    yield key, tensors.get_tensor(key)
                elif (number := new_number.get(int(in_layer["layer"]))) is not None:
                    written.add(number)
                    yield f"{in_layer['before']}{number}{in_layer['after']}", tensors.get_tensor(key)


def _shards(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size_bytes = 0
    for key, tensor in tensors:
        shard[key] = tensor
        size_bytes += tensor.nbytes
        if size_bytes >= SHARD_BYTES:
            yield shard
            shard, size_bytes = {}, 0
    if shard:
        yield shard
