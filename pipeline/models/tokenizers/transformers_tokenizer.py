"""The tokenizer of a model folder, loaded by transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.contracts import IntArray, Message
from pipeline.errors import CorpusError, ModelError
from pipeline.models.tokenizers.base import RenderedChat, Tokens
from pipeline.models.tokenizers.byte_tokenizer import byte_alphabet


class TransformersTokenizer:
    """A fast tokenizer of transformers, from local files and without remote code."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError if the folder has no tokenizer, or a slow one, which has no offsets."""
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ModelError(f"tokenizer {folder}: needs transformers; run: make install") from error
        try:
            inner = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise ModelError(f"tokenizer {folder}: cannot be loaded: {' '.join(str(error).split())[:200]}") from error
        if not inner.is_fast:
            raise ModelError(
                f"tokenizer {folder}: expected a fast tokenizer (tokenizer.json), since only those have offsets"
            )
        self._folder = folder
        self._inner: Any = inner
        self._byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
        self._token_bytes: dict[int, bytes | None] = {}
        self._special: dict[int, bytes] = {
            token_id: str(token).encode() for token_id, token in inner.added_tokens_decoder.items()
        }

    @property
    def size(self) -> int:
        """The largest token id plus one."""
        return int(max(self._inner.get_vocab().values())) + 1

    def encode(self, text: str, *, rendered: bool = False) -> Tokens:
        """See Tokenizer."""
        encoded = self._inner(
            text, add_special_tokens=not rendered, return_offsets_mapping=True, truncation=False, verbose=False
        )
        ids_N = np.array(encoded["input_ids"], np.int32)
        byte_end_N = self._ends_by_bytes(ids_N, text)
        if byte_end_N is None:
            byte_end_N = _ends_by_offsets(encoded["offset_mapping"], text)
        return Tokens(ids_N, byte_end_N)

    def render(
        self, messages: Sequence[Message], *, spans: bool = True, add_generation_prompt: bool = False
    ) -> RenderedChat:
        """See Tokenizer. A message's span is what it adds to the chat before it with the generation prompt."""
        if self._inner.chat_template is None:
            raise ModelError(
                f"tokenizer {self._folder}: has no chat template, but the corpus has chats; use texts instead"
            )
        chat = [{"role": message.role, "content": message.content} for message in messages]
        text = self._apply_template(chat, add_generation_prompt)
        numbers = [number for number, message in enumerate(messages) if spans and message.role == "assistant"]
        return RenderedChat(text, tuple(self._span(chat, number, text) for number in numbers))

    def token_text(self, token_id: int) -> str:
        """See Tokenizer."""
        return str(self._inner.decode([token_id], clean_up_tokenization_spaces=False)) or f"<{token_id}>"

    def decode(self, input_ids_N: IntArray) -> str:
        """See Tokenizer."""
        return str(self._inner.decode(input_ids_N.tolist(), clean_up_tokenization_spaces=False))

    def _apply_template(self, chat: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        import jinja2

        try:
            return str(
                self._inner.apply_chat_template(chat, tokenize=False, add_generation_prompt=add_generation_prompt)
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            raise CorpusError(f"the chat template rejects the chat: {' '.join(str(error).split())[:200]}") from error

    def _span(self, chat: list[dict[str, str]], number: int, text: str) -> tuple[int, int]:
        """Return the character span of the `number`-th message. Raises ModelError if the template has no such span."""
        through = self._apply_template(chat[: number + 1])
        if not text.startswith(through):
            raise ModelError(
                f"tokenizer {self._folder}: its chat template changes earlier messages when one is added, so the "
                "assistant's tokens cannot be located; set corpus.loss_on=all"
            )
        before = [self._apply_template(chat[:number], prompt) for prompt in (True, False)] if number else [""]
        return max((len(start) for start in before if through.startswith(start)), default=0), len(through)

    def _ends_by_bytes(self, ids_N: IntArray, text: str) -> IntArray | None:
        """Return the ends by the length of each token's bytes; None if these do not add up to the text."""
        data = text.encode()
        byte_end_N = np.zeros(len(ids_N), np.int32)
        position = 0
        for number, token_id in enumerate(ids_N.tolist()):
            token = self._bytes(token_id)
            if token is not None and data.startswith(token, position):
                position += len(token)
            elif token_id not in self._special:
                return None
            byte_end_N[number] = position
        return byte_end_N if position == len(data) else None

    def _bytes(self, token_id: int) -> bytes | None:
        """Return the bytes of a special or byte-level token; None for a token of another kind."""
        if token_id in self._special:
            return self._special[token_id]
        if token_id not in self._token_bytes:
            token = str(self._inner.convert_ids_to_tokens(token_id))
            is_byte_level = all(character in self._byte_of for character in token)
            self._token_bytes[token_id] = bytes(self._byte_of[c] for c in token) if is_byte_level else None
        return self._token_bytes[token_id]


def _ends_by_offsets(offsets: Sequence[tuple[int, int]], text: str) -> IntArray:
    """Byte end of each token; one that ends inside a character ends at that character's first byte."""
    starts = np.array([start for start, _ in offsets], np.int64)
    ends = np.array([end for _, end in offsets], np.int64)
    inside = ends > starts  # tokens that the tokenizer put around the text have empty ranges
    later = np.where(inside, starts, len(text))
    next_start = np.append(np.minimum.accumulate(later[::-1])[::-1][1:], len(text))
    ends = np.where(inside, np.minimum(ends, np.maximum(next_start, starts)), 0)
    character_end = np.cumsum([0, *(len(character.encode()) for character in text)])
    return np.maximum.accumulate(character_end[ends]).astype(np.int32)
