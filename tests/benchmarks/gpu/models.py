"""Llamas with random weights in the sizes of published models, since no model can be downloaded on the GPU machine."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gpu.timing import device
from pipeline.contracts import TokenSequence
from pipeline.models.folders import ModelFolder

EMBEDDING_SCALE = 3.0
"""Factor on the embeddings, which are also the LM head: the logits of random weights differ too little otherwise."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama with tied embeddings."""

    name: str
    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int

    def config(self) -> LlamaConfig:
        """Return the config of transformers."""
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.key_value_heads,
            max_position_embeddings=8192, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
        )  # fmt: skip


LLAMA_135M = Shape("135M Llama", 49_152, 576, 1536, 30, 9, 3)
LLAMA_1B = Shape("1B Llama", 128_256, 2048, 8192, 16, 32, 8)
TINY = Shape("tiny Llama", 320, 32, 64, 2, 2, 1)


def random_model(shape: Shape, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return the model with random weights, on the device."""
    torch.manual_seed(0)
    with torch.device(device()):
        model = LlamaForCausalLM(shape.config())
    model.get_input_embeddings().weight.data.mul_(EMBEDDING_SCALE)
    return model.to(dtype)


@contextmanager
def model_folder(shape: Shape, dtype: torch.dtype) -> Iterator[ModelFolder]:
    """Provide a temporary folder with the model's config and weights, without a tokenizer."""
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        random_model(shape, dtype).save_pretrained(folder)
        config = shape.config().to_dict()
        yield ModelFolder(Path(folder), shape.name, None, digest="", tokenizer_digest="", config=config)


def random_sequences(count: int, length: int, vocabulary: int) -> list[TokenSequence]:
    """Return sequences of random tokens, each of which is a label."""
    draw = np.random.default_rng(0)
    ones, ends = np.ones(length, np.uint8), np.arange(1, length + 1, dtype=np.int32)
    ids_SN = draw.integers(0, vocabulary, (count, length), dtype=np.int32)
    return [TokenSequence(f"s{i:06d}", f"d{i}", None, "train", ids_N, ones, ends) for i, ids_N in enumerate(ids_SN)]
