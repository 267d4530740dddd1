"""The tokenizer protocol."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.contracts import IntArray, Message


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of a text, and the offset of each token's end in the text's UTF-8 bytes (non-decreasing)."""

    input_ids_N: IntArray
    byte_end_N: IntArray


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A chat as its chat template renders it, and the character spans of the assistant's messages."""

    text: str
    assistant_spans: tuple[tuple[int, int], ...]


class Tokenizer(Protocol):
    """Encodes and decodes texts, renders chats."""

    @property
    def size(self) -> int:
        """The largest token id plus one."""

    def encode(self, text: str, *, rendered: bool = False) -> Tokens:
        """Tokenize a text. For a `rendered` chat, special tokens are parsed but none are added around the text."""

    def render(
        self, messages: Sequence[Message], *, spans: bool = True, add_generation_prompt: bool = False
    ) -> RenderedChat:
        """Apply the chat template; locate the assistant's messages if `spans`.

        Raises ModelError for a missing chat template, or one that makes spans impossible, and CorpusError for a chat
        that the template rejects.
        """

    def token_text(self, token_id: int) -> str:
        """Return a token as readable text."""

    def decode(self, input_ids_N: IntArray) -> str:
        """Return the text of token ids."""
