"""Canonical JSON, sha256 digests and fingerprints, and the fields in which two identities differ."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.contracts import IntArray


def canonical_json(value: Any) -> str:
    """Return JSON with sorted keys and no spaces. Raises ValueError for NaN, TypeError for what JSON cannot express."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(fields: Mapping[str, Any]) -> str:
    """Return the hex sha256 of the fields' canonical JSON."""
    return sha256_bytes(canonical_json(fields).encode())


def sha256_bytes(data: bytes) -> str:
    """Return the hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a local file's content, which is read in blocks. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def token_digest(input_ids_N: IntArray) -> str:
    """Return the hex sha256 of token ids as little-endian int32 bytes."""
    return sha256_bytes(np.ascontiguousarray(input_ids_N, dtype="<i4").tobytes())


def uniform(*parts: str | int) -> float:
    """Return a number in [0, 1) from the sha256 of the parts: a pseudo-random draw that is equal on every machine."""
    digest = hashlib.sha256("\0".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


def differing_fields(got: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return a line for each field that differs, by its dotted path: `teacher.revision: got X, expected Y`."""
    return [
        f"{path}: got {_format(got_value)}, expected {_format(expected_value)}"
        for path, got_value, expected_value in _leaves(dict(got), dict(expected), "")
        if got_value != expected_value
    ]


_MISSING = object()


def _leaves(got: Any, expected: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if not (isinstance(got, dict) and isinstance(expected, dict)):
        yield path, _as_json(got), _as_json(expected)
        return
    for key in sorted(got.keys() | expected.keys()):
        inner = f"{path}.{key}" if path else str(key)
        yield from _leaves(got.get(key, _MISSING), expected.get(key, _MISSING), inner)


def _as_json(value: Any) -> Any:
    """Convert as JSON does, so that a tuple equals the list as which it was stored."""
    return value if value is _MISSING else json.loads(canonical_json(value))


def _format(value: Any) -> str:
    return "nothing" if value is _MISSING else canonical_json(value)
