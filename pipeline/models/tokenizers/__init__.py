"""Tokenizers: a model's own through transformers, or bytes for the dummy teacher and tests.

Both return the byte offset at which each token ends, by which tokens of different tokenizers can be aligned.
"""

import json
from pathlib import Path

from pipeline.models.tokenizers.base import RenderedChat, Tokenizer, Tokens
from pipeline.models.tokenizers.byte_tokenizer import TOKENIZER_CONFIG, ByteTokenizer

__all__ = ["ByteTokenizer", "RenderedChat", "Tokenizer", "Tokens", "load_tokenizer"]


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a folder. Raises ModelError."""
    config = folder / TOKENIZER_CONFIG
    if config.is_file() and json.loads(config.read_bytes()).get("stillhouse") == ByteTokenizer.NAME:
        return ByteTokenizer()
    from pipeline.models.tokenizers.transformers_tokenizer import TransformersTokenizer

    return TransformersTokenizer(folder)
