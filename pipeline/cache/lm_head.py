"""The teacher's LM head, once a cache, so that kept final states give exact distributions back.

A safetensors file with `weight_bits` (bfloat16 by its bits, as uint16, since numpy has no such type), perhaps `bias`,
`scalars` (scale, soft cap or NaN), and a sha256 of these: no commit names the file.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.storage import layout
from pipeline.cache.storage.store import Store
from pipeline.contracts import LmHead
from pipeline.errors import DamageError, StorageError


def write_lm_head(store: Store, head: LmHead) -> None:
    """Keep the head. Any replica may call it. Raises DamageError where the store has another one."""
    if not store.put_if_absent(layout.LM_HEAD, _to_bytes(head)):
        raise DamageError(f"{store.where(layout.LM_HEAD)}: expected this teacher's LM head, got another one")


def read_lm_head(store: Store) -> LmHead | None:
    """The head, or None where there is none. Raises DamageError where it is not what was written."""
    data = store.read_if_present(layout.LM_HEAD)
    if data is None:
        return None
    try:
        return _from_bytes(data)
    except (ValueError, KeyError, TypeError) as error:
        raise DamageError(f"{store.where(layout.LM_HEAD)}: not what was written: {error!r}") from error


def _to_bytes(head: LmHead) -> bytes:
    cap = np.nan if head.soft_cap is None else head.soft_cap
    tensors = {"weight_bits": np.ascontiguousarray(head.weight_VD), "scalars": np.array([head.scale, cap])}
    if head.bias_V is not None:
        tensors["bias"] = np.ascontiguousarray(head.bias_V)
    data: bytes = _safetensors().save({**tensors, "sha256": _digest(tensors)})
    return data


def _from_bytes(data: bytes) -> LmHead:
    load = _safetensors().load
    from safetensors import SafetensorError

    try:
        tensors: dict[str, Any] = load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if not np.array_equal(tensors.pop("sha256"), _digest(tensors)):
        raise ValueError("its tensors do not give its sha256")
    scale, cap = tensors["scalars"].tolist()
    return LmHead(tensors["weight_bits"], tensors.get("bias"), scale, None if np.isnan(cap) else cap)


def _digest(tensors: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return np.frombuffer(digest.digest(), np.uint8)


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise StorageError("an LM head is kept as safetensors; run: pip install safetensors") from error
    return safetensors.numpy
