"""The tokenizer of a model folder, through transformers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.contracts import IntArray, Message
from pipeline.errors import CorpusError, ModelError
from pipeline.models.tokenizers.base import RenderedChat, Tokens
from pipeline.models.tokenizers.byte_tokenizer import byte_alphabet


class TransformersTokenizer:
    """The tokenizer of a model folder, through transformers: local files only, none of its code."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError where there is none, or one that cannot say where its tokens lie."""
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ModelError(f"tokenizer {folder}: needs transformers; run: make install") from error
        try:
            inner = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise ModelError(f"tokenizer {folder}: cannot be loaded: {' '.join(str(error).split())[:200]}") from error
        if not inner.is_fast:
            raise ModelError(f"tokenizer {folder}: expected a tokenizer.json, since only that knows where tokens lie")
        self._folder = folder
        self._inner: Any = inner
        self._bytes_of = {character: byte for byte, character in enumerate(byte_alphabet())}
        self._pieces: dict[int, bytes | None] = {}
        self._special: dict[int, bytes] = {
            token_id: str(token).encode() for token_id, token in inner.added_tokens_decoder.items()
        }

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return int(max(self._inner.get_vocab().values())) + 1

    def encode(self, text: str, *, rendered: bool = False) -> Tokens:
        """See Tokenizer."""
        encoded = self._inner(
            text, add_special_tokens=not rendered, return_offsets_mapping=True, truncation=False, verbose=False
        )
        ids = np.array(encoded["input_ids"], np.int32)
        ends = self._ends_by_bytes(ids, text)
        if ends is None:
            ends = _ends_by_offsets(encoded["offset_mapping"], text)
        return Tokens(ids, ends)

    def render(self, messages: Sequence[Message], *, spans: bool = True, reply: bool = False) -> RenderedChat:
        """See Tokenizer. An assistant's part is what its message adds to the chat so far and the generation prompt."""
        if self._inner.chat_template is None:
            raise ModelError(f"tokenizer {self._folder}: has no chat template, the corpus has chats: give it texts")
        chat = [{"role": message.role, "content": message.content} for message in messages]
        text = self._template(chat, prompt=reply)
        turns = [number for number, message in enumerate(messages) if spans and message.role == "assistant"]
        return RenderedChat(text, tuple(self._span(chat, number, text) for number in turns))

    def token_text(self, token_id: int) -> str:
        """See Tokenizer."""
        return str(self._inner.decode([token_id], clean_up_tokenization_spaces=False)) or f"<{token_id}>"

    def decode(self, input_ids_N: IntArray) -> str:
        """See Tokenizer."""
        return str(self._inner.decode(input_ids_N.tolist(), clean_up_tokenization_spaces=False))

    def _template(self, chat: list[dict[str, str]], *, prompt: bool = False) -> str:
        import jinja2

        try:
            return str(self._inner.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt))
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            raise CorpusError(f"the chat template refuses the chat: {' '.join(str(error).split())[:200]}") from error

    def _span(self, chat: list[dict[str, str]], number: int, text: str) -> tuple[int, int]:
        """The characters of the `number`-th message. Templates that rewrite what was said before are refused."""
        upto = self._template(chat[: number + 1])
        if not text.startswith(upto):
            raise ModelError(
                f"tokenizer {self._folder}: its chat template rewrites earlier turns, so that an assistant's tokens "
                f"cannot be told apart: set corpus.loss_on=all"
            )
        before = (self._template(chat[:number], prompt=prompt) for prompt in (True, False)) if number else iter(("",))
        return max((len(start) for start in before if upto.startswith(start)), default=0), len(upto)

    def _ends_by_bytes(self, ids: IntArray, text: str) -> IntArray | None:
        """Ends by the bytes that each id stands for; None where these do not make up the text."""
        data = text.encode()
        ends = np.zeros(len(ids), np.int32)
        position = 0
        for number, token_id in enumerate(ids.tolist()):
            piece = self._piece(token_id)
            if piece is not None and data.startswith(piece, position):
                position += len(piece)
            elif token_id not in self._special:
                return None
            ends[number] = position
        return ends if position == len(data) else None

    def _piece(self, token_id: int) -> bytes | None:
        """The bytes that a byte-level token stands for, None for a token of another kind."""
        if token_id in self._special:
            return self._special[token_id]
        if token_id not in self._pieces:
            token = str(self._inner.convert_ids_to_tokens(token_id))
            known = all(character in self._bytes_of for character in token)
            self._pieces[token_id] = bytes(self._bytes_of[c] for c in token) if known else None
        return self._pieces[token_id]


def _ends_by_offsets(offsets: Sequence[tuple[int, int]], text: str) -> IntArray:
    """Ends by the tokenizer's own character ranges. A token that splits a character ends where the character starts."""
    starts = np.array([start for start, _ in offsets], np.int64)
    ends = np.array([end for _, end in offsets], np.int64)
    inside = ends > starts  # tokens that the tokenizer put around the text have empty ranges
    later = np.where(inside, starts, len(text))
    next_start = np.append(np.minimum.accumulate(later[::-1])[::-1][1:], len(text))
    ends = np.where(inside, np.minimum(ends, np.maximum(next_start, starts)), 0)
    character_end = np.cumsum([0, *_utf8_lengths(text)])
    return np.maximum.accumulate(character_end[ends]).astype(np.int32)


def _utf8_lengths(text: str) -> Iterator[int]:
    return (1 if c < "\x80" else 2 if c < "\u0800" else 3 if c < "\U00010000" else 4 for c in text)
