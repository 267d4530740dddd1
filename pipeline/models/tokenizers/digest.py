"""Digest of a tokenizer, which does not change when a library saves the same tokenizer again."""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.identity import fingerprint, sha256_bytes

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a tokenizer; a folder has some of them."""

_SETTINGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "bos_token", "eos_token", "chat_template")
"""Keys of tokenizer_config.json that change the token ids of a text."""


def digest_tokenizer_files(files: Mapping[str, bytes]) -> str:
    """Return the sha256 over what determines token ids, from contents by file name. Raises ValueError (not JSON)."""
    if "tokenizer.json" not in files:
        return fingerprint({name: sha256_bytes(data) for name, data in files.items()})
    rules = _object(files["tokenizer.json"])
    config = _object(files.get("tokenizer_config.json", b"{}"))
    settings = {key: _token_text(config[key]) for key in _SETTINGS if config.get(key) is not None}
    if "chat_template.jinja" in files:
        settings["chat_template"] = files["chat_template.jinja"].decode()
    return fingerprint({"rules": {**rules, "truncation": None, "padding": None}, "settings": settings})


def _token_text(value: Any) -> Any:
    """Return a special token's text; some versions store an object with more fields."""
    return value["content"] if isinstance(value, dict) and "content" in value else value


def _object(data: bytes) -> dict[str, Any]:
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    return value
