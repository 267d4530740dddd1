"""Tokenizers: a model's own, through transformers, or plain bytes, for tests and the dummy teacher.

Both say for every token where it ends in the text's UTF-8 bytes, which is what other tokenizers are aligned by.
"""

import json
from pathlib import Path

from pipeline.models.tokenizers.base import RenderedChat, Tokenizer, Tokens
from pipeline.models.tokenizers.byte_tokenizer import TOKENIZER_CONFIG, ByteTokenizer

__all__ = ["ByteTokenizer", "RenderedChat", "Tokenizer", "Tokens", "load_tokenizer"]


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer whose files lie in a folder. Raises ModelError."""
    config = folder / TOKENIZER_CONFIG
    if config.is_file() and json.loads(config.read_bytes()).get("stillhouse") == ByteTokenizer.NAME:
        return ByteTokenizer()
    from pipeline.models.tokenizers.transformers_tokenizer import TransformersTokenizer

    return TransformersTokenizer(folder)
