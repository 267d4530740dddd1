"""What a student takes over from a teacher: chosen layers, copied file by file, tensor by tensor.

The teacher is never built and never whole in memory: its checkpoint files are mapped, the tensors that the student
keeps are written into a smaller checkpoint with the layers renumbered, and that one is what gets loaded.
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
"""Tensors are gathered up to this size before they are written."""

_LAYER_KEY = re.compile(r"^(?P<before>(?:(?!\d+\.)[^.]+\.)*)(?P<layer>\d+)(?P<after>\..*)$")
"""A tensor of a layer: the first part of its name that is a number is the layer's."""


def evenly_spaced_layers(kept: int, layers: int) -> tuple[int, ...]:
    """Which of `layers` layers to keep so that `kept` are spread evenly, the first and the last among them.

    Raises RecipeError unless 1 <= kept <= layers.
    """
    if not 1 <= kept <= layers:
        raise RecipeError(f"student.layers: expected 1..{layers} (the teacher's layers), got {kept}")
    if kept == 1:
        return (0,)
    return tuple((2 * i * (layers - 1) + kept - 1) // (2 * (kept - 1)) for i in range(kept))


def resolve_layers(wanted: int | Sequence[int], layers: int) -> tuple[int, ...]:
    """The layers that a recipe's `student.layers` means. Raises RecipeError."""
    if isinstance(wanted, int):
        return evenly_spaced_layers(wanted, layers)
    chosen = tuple(wanted)
    if not chosen or list(chosen) != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < layers:
        raise RecipeError(f"student.layers: expected rising layer numbers in 0..{layers - 1}, got {list(chosen)}")
    return chosen


def prune_config(config: PretrainedConfig, keep: Sequence[int]) -> PretrainedConfig:
    """The config of the same model with only the layers `keep`; lists with one item a layer are cut alike."""
    layers: int = config.num_hidden_layers
    values: dict[str, Any] = config.to_dict()
    depth_key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    for key, value in values.items():
        if isinstance(value, list) and len(value) == layers:
            values[key] = [value[layer] for layer in keep]
    values[depth_key] = len(keep)
    cut: PretrainedConfig = type(config).from_dict(values)
    return cut


def prune_checkpoint(source: Path, keep: Sequence[int], target: Path) -> None:
    """Write into `target` the model in `source` with only the layers `keep`, in that order.

    Reads the source's safetensors files one tensor at a time. Raises ModelError if a kept layer has no tensors.
    """
    config = AutoConfig.from_pretrained(source)
    prune_config(config, keep).save_pretrained(target)
    if (source / "generation_config.json").exists():
        GenerationConfig.from_pretrained(source).save_pretrained(target)
    weight_map: dict[str, str] = {}
    found: set[int] = set()
    for shard, tensors in enumerate(_shards(_kept_tensors(source, keep, found))):
        name = f"model-{shard:05d}.safetensors"
        save_file(tensors, target / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    missing = sorted(set(range(len(keep))) - found)
    if missing:
        raise ModelError(
            f"model {source}: expected tensors of layers {[keep[i] for i in missing]}, got none of that number; "
            "start the student from a checkpoint or a config"
        )
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


def _kept_tensors(source: Path, keep: Sequence[int], found: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    new_number = {layer: position for position, layer in enumerate(keep)}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                in_layer = _LAYER_KEY.match(key)
                if in_layer is None:
                    yield key, tensors.get_tensor(key)
                elif (number := new_number.get(int(in_layer["layer"]))) is not None:
                    found.add(number)
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
