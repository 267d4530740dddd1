"""The tokenizer of the dummy teacher: every byte is a token. Pure Python, so that tests need no transformers."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.contracts import IntArray, Message
from pipeline.models.tokenizers.base import RenderedChat, Tokens
from pipeline.models.tokenizers.digest import digest_tokenizer_files

TOKENIZER_CONFIG = "tokenizer_config.json"


class ByteTokenizer:
    """Ids 0..255 are bytes, 256 ends a chat's turn. A tokenizer for tests and the dummy teacher."""

    NAME = "bytes/1"
    TURN = 256

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return 257

    @property
    def digest(self) -> str:
        """What identifies it, as `digest_tokenizer_files` does every tokenizer."""
        return digest_tokenizer_files(self.files())

    def files(self) -> dict[str, bytes]:
        """Files from which `load_tokenizer` makes this one, and transformers one that gives the same ids."""
        return {name: json.dumps(value).encode() for name, value in _byte_tokenizer_files(self.TURN).items()}

    def encode(self, text: str, *, rendered: bool = False) -> Tokens:
        """One id a byte; the end of a turn is one id where the text is a rendered chat."""
        parts = text.split(_TURN_TEXT) if rendered else [text]
        ids: list[int] = []
        ends: list[int] = []
        done_bytes = 0
        for number, part in enumerate(parts):
            if number:
                done_bytes += len(_TURN_TEXT)
                ids.append(self.TURN)
                ends.append(done_bytes)
            data = part.encode()
            ids.extend(data)
            ends.extend(range(done_bytes + 1, done_bytes + len(data) + 1))
            done_bytes += len(data)
        return Tokens(np.array(ids, np.int32), np.array(ends, np.int32))

    def render(self, messages: Sequence[Message], *, spans: bool = True, reply: bool = False) -> RenderedChat:
        """`role: content<|turn|>` for every message, and `assistant: ` for a reply."""
        text, assistant = "", []
        for message in messages:
            start = len(text) + len(message.role) + 2
            text += f"{message.role}: {message.content}{_TURN_TEXT}"
            if spans and message.role == "assistant":
                assistant.append((start, len(text)))
        return RenderedChat(text + ("assistant: " if reply else ""), tuple(assistant))

    def token_text(self, token_id: int) -> str:
        """The byte as Latin-1 text."""
        return _TURN_TEXT if token_id == self.TURN else chr(token_id) if 0 <= token_id < 256 else f"<{token_id}>"

    def decode(self, input_ids_N: IntArray) -> str:
        """Bytes as text; broken UTF-8 is shown as such."""
        pieces = (_TURN_TEXT.encode() if i == self.TURN else bytes([i]) for i in input_ids_N.tolist() if 0 <= i <= 256)
        return b"".join(pieces).decode("utf-8", "replace")


_TURN_TEXT = "<|turn|>"


def _byte_tokenizer_files(turn: int) -> dict[str, Any]:
    alphabet = {character: byte for byte, character in enumerate(byte_alphabet())}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    special = {
        "id": turn,
        "content": _TURN_TEXT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    rules = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": alphabet, "merges": []},
    }
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '" + _TURN_TEXT + "' }}{% endfor %}"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _TURN_TEXT,
        "chat_template": template,
        "stillhouse": ByteTokenizer.NAME,
    }
    return {"tokenizer.json": rules, TOKENIZER_CONFIG: config}


def byte_alphabet() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte: itself, or one from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]
