"""What a tokenizer is to this house."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.contracts import IntArray, Message


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text's tokens, and the byte of the text at which each ends (never falling)."""

    input_ids_N: IntArray
    byte_end_N: IntArray


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A chat as the text that a model reads, and the character ranges that the assistant wrote."""

    text: str
    assistant: tuple[tuple[int, int], ...]


class Tokenizer(Protocol):
    """What cutting documents and reading caches needs of a tokenizer."""

    @property
    def size(self) -> int:
        """One more than the largest id."""
        ...

    def encode(self, text: str, *, rendered: bool = False) -> Tokens:
        """The text's tokens. Those that the tokenizer puts around a text are left out of a `rendered` chat."""
        ...

    def render(self, messages: Sequence[Message], *, spans: bool = True, reply: bool = False) -> RenderedChat:
        """A chat as text, and with `spans` what the assistant wrote. With `reply` it ends where the next answer begins.

        Raises ModelError (no chat template, or one that gives no spans) and CorpusError (it refuses the chat).
        """
        ...

    def token_text(self, token_id: int) -> str:
        """One token as readable text."""
        ...

    def decode(self, input_ids_N: IntArray) -> str:
        """Tokens as text."""
        ...
