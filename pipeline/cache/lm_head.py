"""The teacher's LM head, stored once a cache: it maps the audited states back to exact distributions.

A safetensors file with `weight_bits` (bfloat16 by its bits, as uint16, since numpy has no such type), an optional
`bias`, `scalars` (scale; soft cap or NaN), and a sha256 of these, since no commit names the file.
"""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pipeline.cache.damage import damage_if_invalid
from pipeline.cache.storage import layout
from pipeline.cache.storage.store import Store
from pipeline.contracts import LmHead
from pipeline.errors import DamageError


def write_lm_head(store: Store, head: LmHead) -> None:
    """Store the head. Every replica may call it. Raises DamageError where the store holds a different one."""
    if not store.put_if_absent(layout.LM_HEAD, _to_bytes(head)):
        where = store.where(layout.LM_HEAD)
        raise DamageError(f"{where}: expected the weights of this teacher's LM head, got different ones")


def read_lm_head(store: Store) -> LmHead | None:
    """Read the head; None where there is none. Raises DamageError where it is invalid."""
    data = store.read_if_present(layout.LM_HEAD)
    if data is None:
        return None
    with damage_if_invalid(store.where(layout.LM_HEAD)):
        return _from_bytes(data)


def _to_bytes(head: LmHead) -> bytes:
    cap = np.nan if head.soft_cap is None else head.soft_cap
    tensors = {"weight_bits": np.ascontiguousarray(head.weight_VD), "scalars": np.array([head.scale, cap])}
    if head.bias_V is not None:
        tensors["bias"] = np.ascontiguousarray(head.bias_V)
    return bytes(save({**tensors, "sha256": _digest(tensors)}))


def _from_bytes(data: bytes) -> LmHead:
    try:
        tensors: dict[str, Any] = load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    stored, computed = tensors.pop("sha256"), _digest(tensors)
    if not np.array_equal(stored, computed):
        raise ValueError(f"expected sha256 {stored.tobytes().hex()} of its tensors, got {computed.tobytes().hex()}")
    scale, cap = tensors["scalars"].tolist()
    return LmHead(tensors["weight_bits"], tensors.get("bias"), scale, None if np.isnan(cap) else cap)


def _digest(tensors: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return np.frombuffer(digest.digest(), np.uint8)
