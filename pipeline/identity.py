"""What makes two things the same: canonical JSON, fingerprints, digests, and the difference between two identities."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.contracts import IntArray

READ_BYTES = 1 << 20


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces. Raises ValueError (NaN) or TypeError (not JSON)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(fields: Mapping[str, Any]) -> str:
    """Hex sha256 of the canonical JSON of everything that changes a byte."""
    return sha256_bytes(canonical_json(fields).encode())


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a local file's bytes, read in pieces. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def token_digest(input_ids_N: IntArray) -> str:
    """Hex sha256 of token ids as little-endian int32 bytes."""
    return sha256_bytes(np.ascontiguousarray(input_ids_N, dtype="<i4").tobytes())


def uniform(*parts: str | int) -> float:
    """A number in [0, 1) that is a pure function of its parts, the same on every machine."""
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


def differing_fields(got: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """One entry a field that differs, by its dotted path: `teacher.revision: got X, expected Y`."""
    return [
        f"{path}: got {_shown(have)}, expected {_shown(want)}"
        for path, have, want in _leaves(dict(got), dict(expected), "")
        if have != want
    ]


_MISSING = object()


def _leaves(got: Any, expected: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if not (isinstance(got, dict) and isinstance(expected, dict)):
        yield path, _plain(got), _plain(expected)
        return
    for key in sorted(got.keys() | expected.keys()):
        inner = f"{path}.{key}" if path else str(key)
        yield from _leaves(got.get(key, _MISSING), expected.get(key, _MISSING), inner)


def _plain(value: Any) -> Any:
    """A value as JSON would give it back, so that a tuple equals the list that it is stored as."""
    return value if value is _MISSING else json.loads(canonical_json(value))


def _shown(value: Any) -> str:
    return "nothing" if value is _MISSING else canonical_json(value)
