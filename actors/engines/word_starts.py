"""Which tokens of a vocabulary start a new word, judged by the first character of the piece."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ModelError

_SPACES = tuple(" \t\n\r\u0120\u010a\u0109\u010d\u2581")
"""White space as plain text, in pieces of byte-level BPE (Ġ, Ċ, ĉ, č) and in pieces of SentencePiece (▁)."""


def word_starts(folder: Path, vocabulary: int) -> NDArray[np.bool_]:
    """Return a [V] mask of the tokens that begin with white space or are special: the word before them is complete.

    Raises ModelError if transformers cannot load a tokenizer from the folder.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(f"tokenizer {folder}: cannot be loaded: {' '.join(str(error).split())[:200]}") from error
    starts_V = np.zeros(vocabulary, dtype=bool)
    for piece, token_id in tokenizer.get_vocab().items():
        starts_V[token_id] = piece.startswith(_SPACES) or token_id in tokenizer.added_tokens_decoder
    return starts_V
