"""Codecs of the columns that describe the sequence of a row: ids, tokens, loss mask, byte offsets."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.cache.format.codecs.scalars import Buffer
from pipeline.contracts import IntArray, MaskArray, TokenSequence


def encode_sequence(sequence: TokenSequence) -> dict[str, Any]:
    """Encode the sequence's columns. `input_digest` is the sha256 of the token ids as little-endian int32."""
    ids_N = sequence.input_ids_N.astype("<i4")
    return {
        "sequence_id": sequence.sequence_id,
        "document_id": sequence.document_id,
        "domain": sequence.domain,
        "split": sequence.split,
        "n_tokens": len(ids_N),
        "byte_start": sequence.byte_start,
        "input_ids": ids_N,
        "input_digest": hashlib.sha256(ids_N.tobytes()).hexdigest(),
        "audited": sequence.audited,
        "loss_mask": encode_mask(sequence.loss_mask_N),
        "byte_end": encode_offsets(sequence.byte_end_N, sequence.byte_start),
    }


def decode_sequence(row: Mapping[str, Any]) -> TokenSequence:
    """Decode the sequence of a row. Raises ValueError if its columns differ in the number of tokens."""
    ids_N = np.asarray(row["input_ids"], np.int32)
    tokens = int(row["n_tokens"])
    if len(ids_N) != tokens:
        raise ValueError(f"input_ids: expected {tokens} ids, got {len(ids_N)}")
    return TokenSequence(
        sequence_id=row["sequence_id"],
        document_id=row["document_id"],
        domain=row["domain"],
        split=row["split"],
        input_ids_N=ids_N,
        loss_mask_N=decode_mask(row["loss_mask"], tokens),
        byte_end_N=decode_offsets(row["byte_end"], tokens, int(row["byte_start"])),
        byte_start=int(row["byte_start"]),
        audited=bool(row["audited"]),
    )


def encode_mask(mask_N: MaskArray) -> bytes:
    """Encode as one bit a token, the first token in the lowest bit."""
    return np.packbits(mask_N != 0, bitorder="little").tobytes()


def decode_mask(data: Buffer, tokens: int) -> MaskArray:
    """Decode the mask, 0 or 1 for each token. Raises ValueError if the number of bytes is wrong."""
    packed = np.frombuffer(data, np.uint8)
    if len(packed) != (tokens + 7) // 8:
        raise ValueError(f"loss_mask: expected {(tokens + 7) // 8} bytes, got {len(packed)}")
    return np.unpackbits(packed, count=tokens, bitorder="little")


def encode_offsets(byte_end_N: IntArray, byte_start: int) -> bytes:
    """Encode token lengths in bytes as int32 in four byte planes, of which all but the first are nearly all zeros."""
    lengths_N = np.diff(byte_end_N.astype(np.int64), prepend=byte_start).astype("<i4")
    return lengths_N.view(np.uint8).reshape(-1, 4).T.tobytes()


def decode_offsets(data: Buffer, tokens: int, byte_start: int) -> IntArray:
    """Decode each token's end offset. Raises ValueError if the number of bytes is wrong."""
    planes = np.frombuffer(data, np.uint8).reshape(4, tokens)
    end_N = planes.T.copy().view("<i4")[:, 0]
    end_N[:1] += byte_start
    return np.add.accumulate(end_N, out=end_N)
