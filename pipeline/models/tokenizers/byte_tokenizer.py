"""A tokenizer whose tokens are bytes, for the dummy teacher and tests. Needs no transformers."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.contracts import IntArray, Message
from pipeline.models.tokenizers.base import RenderedChat, Tokens
from pipeline.models.tokenizers.digest import digest_tokenizer_files

TOKENIZER_CONFIG = "tokenizer_config.json"


class ByteTokenizer:
    """Byte tokenizer: ids 0..255 are bytes, id 256 is the special token that ends a message of a chat."""

    NAME = "bytes/1"
    END_OF_MESSAGE = 256

    @property
    def size(self) -> int:
        """The largest token id plus one."""
        return 257

    @property
    def digest(self) -> str:
        """Digest of the tokenizer, by `digest_tokenizer_files`."""
        return digest_tokenizer_files(self.files())

    def files(self) -> dict[str, bytes]:
        """Tokenizer files: `load_tokenizer` returns this class from them, transformers an equivalent tokenizer."""
        return {name: json.dumps(value).encode() for name, value in _tokenizer_files(self.END_OF_MESSAGE).items()}

    def encode(self, text: str, *, rendered: bool = False) -> Tokens:
        """See Tokenizer."""
        parts = text.split(_END_TEXT) if rendered else [text]
        ids = list(parts[0].encode())
        for part in parts[1:]:
            ids += [self.END_OF_MESSAGE, *part.encode()]
        ids_N = np.array(ids, np.int32)
        length_N = np.where(ids_N == self.END_OF_MESSAGE, len(_END_TEXT), 1)
        return Tokens(ids_N, np.cumsum(length_N, dtype=np.int32))

    def render(
        self, messages: Sequence[Message], *, spans: bool = True, add_generation_prompt: bool = False
    ) -> RenderedChat:
        """Render each message as `role: content<|turn|>`, and the generation prompt as `assistant: `."""
        text, assistant = "", []
        for message in messages:
            start = len(text) + len(message.role) + 2
            text += f"{message.role}: {message.content}{_END_TEXT}"
            if spans and message.role == "assistant":
                assistant.append((start, len(text)))
        return RenderedChat(text + ("assistant: " if add_generation_prompt else ""), tuple(assistant))

    def token_text(self, token_id: int) -> str:
        """Return the byte as a Latin-1 character."""
        if token_id == self.END_OF_MESSAGE:
            return _END_TEXT
        return chr(token_id) if 0 <= token_id < 256 else f"<{token_id}>"

    def decode(self, input_ids_N: IntArray) -> str:
        """Decode the bytes as UTF-8, with U+FFFD for what is invalid."""
        ids = (i for i in input_ids_N.tolist() if 0 <= i <= self.END_OF_MESSAGE)
        pieces = (_END_TEXT.encode() if i == self.END_OF_MESSAGE else bytes([i]) for i in ids)
        return b"".join(pieces).decode("utf-8", "replace")


_END_TEXT = "<|turn|>"


def _tokenizer_files(end_id: int) -> dict[str, Any]:
    alphabet = {character: byte for byte, character in enumerate(byte_alphabet())}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = {"id": end_id, "content": _END_TEXT, **flags, "special": True}
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
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '" + _END_TEXT + "' }}{% endfor %}"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _END_TEXT,
        "chat_template": template,
        "stillhouse": ByteTokenizer.NAME,
    }
    return {"tokenizer.json": rules, TOKENIZER_CONFIG: config}


def byte_alphabet() -> list[str]:
    """Return GPT-2's character for each byte in a byte-level vocabulary: the byte's own, or one from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
