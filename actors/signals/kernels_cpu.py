"""Kernels of the fused reduction for a CPU, compiled by numba: each logit is read twice, in the model's dtype.

The kernels release the GIL, so Python threads split the rows. numba is a dependency of vLLM; without it `reduce_rows`
uses the eager reduction, whose torch operations each make a float32 pass over memory.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor

from actors.signals import sums
from pipeline.contracts import CaptureSpec

_GROUP = 16
"""Columns of a group, a stride apart, whose maximum is compared first in the search for the k largest."""
_BLOCK = 2048
"""Terms summed in float32 before they are added to a float64 sum."""
_UNDERFLOW = -170.0
"""Below this x, exp(x) counts as 0; exp(x / 2) is still a normal float32."""
_LEAST_KEY = -(2**31)

Bits = NDArray[np.uint16] | NDArray[np.uint32]
"""Bits of bfloat16 or float32 logits."""


def best_ids(logits_RV: Tensor, k: int) -> Tensor:
    """See `actors.signals.entries.best_ids`."""
    bits, stride = _bits(logits_RV)
    best_RK = np.empty((len(logits_RV), k), np.int64)

    def find(start: int, end: int) -> None:
        _find_best(bits, stride, logits_RV.shape[1], best_RK, start, end)

    _run_in_threads(find, len(logits_RV))
    return torch.from_numpy(best_RK)


def rest_sums(logits_RV: Tensor, peak_R: Tensor, spec: CaptureSpec, boundary_V: Tensor | None) -> Tensor:
    """Return the float32 [R, A] sums (see `sums`) over the logits that are not -inf."""
    bits, stride = _bits(logits_RV)
    vocabulary = logits_RV.shape[1]
    starts_V = np.zeros(vocabulary, np.uint8) if boundary_V is None else boundary_V.numpy().view(np.uint8)
    inverse_C = (1 / np.array(spec.temperatures)).astype(np.float32)
    sums_RA = np.zeros((len(logits_RV), sums.POWERS + len(inverse_C)), np.float32)
    peak = peak_R.numpy()

    def sum_rows(start: int, end: int) -> None:
        _sum_rows(bits, stride, peak, starts_V, inverse_C, sums_RA, start, end)

    _run_in_threads(sum_rows, len(logits_RV))
    return torch.from_numpy(sums_RA)


def _bits(logits_RV: Tensor) -> tuple[Bits, int]:
    """View the rows' memory as one flat unsigned-integer array; return it and the row stride."""
    if logits_RV.stride(1) != 1:
        logits_RV = logits_RV.contiguous()
    rows, vocabulary = logits_RV.shape
    stride = logits_RV.stride(0)
    flat = logits_RV.detach().as_strided(((rows - 1) * stride + vocabulary,), (1,))
    return flat.view(torch.uint16 if logits_RV.dtype is torch.bfloat16 else torch.uint32).numpy(), stride


def _run_in_threads(work: Callable[[int, int], None], rows: int) -> None:
    """Run `work(start, end)` over the rows, split over torch's number of threads; one is the calling thread."""
    threads = torch.get_num_threads()
    edges = [rows * part // threads for part in range(threads + 1)]
    others = [_pool(threads).submit(work, *edges[part : part + 2]) for part in range(1, threads)]
    work(edges[0], edges[1])
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "signals", initializer=_reset_affinity)


def _reset_affinity() -> None:
    """Let this thread run on all cores of the process: vLLM pins its threads, and a new thread inherits the pinning."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores: set[int] = set()
    for thread in os.listdir("/proc/self/task"):  # noqa: PTH208
        with suppress(ProcessLookupError):  # the thread has ended
            cores |= os.sched_getaffinity(int(thread))
    os.sched_setaffinity(0, cores)


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that compiles with numba's on-disk cache (beside this file, or in the user's cache folder)."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            compiled: Callable[..., Any] = njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # neither folder is writable: compile in every process
            compiled = njit(nogil=True, **options)(function)
        return compiled

    return decorate


_FASTMATH = {"reassoc", "contract", "arcp", "nsz"}
"""LLVM may reorder sums to vectorise them; infinities and nan are respected."""


def _word(bits: Any) -> Any:
    """Return the float32 bits of a bfloat16 or float32 logit. numba compiles `_word_of` in its place."""
    return np.uint32(int(bits) << 16) if isinstance(bits, np.uint16) else bits


@overload(_word, inline="always", strict=False)  # type: ignore[untyped-decorator]
def _word_of(bits: Any) -> Callable[[Any], Any]:
    """Shift by a constant: a variable shift would be compiled in 64 bits, with half of the vector lanes."""
    if bits is types.uint16:
        return lambda bits: np.uint32(np.uint32(bits) << np.uint32(16))
    return lambda bits: np.uint32(bits)


@_compiled(inline="always")
def _float(bits: Any) -> Any:
    return _word(bits).view(np.float32)


@_compiled(inline="always")
def _key(bits: Any) -> Any:
    """Return an int32 in the order of the float values; -0 and 0 give the same."""
    signed = np.int32(_word(bits))
    key = np.int32(signed ^ ((signed >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return np.int32(0) if key == np.int32(-1) else key


@_compiled(fastmath=_FASTMATH, inline="always")
def _exp(x: Any) -> Any:
    """Return exp(x) of a float32 in -87..0: 2^n times a polynomial of the remainder (coefficients of Cephes' expf)."""
    n = np.rint(x * np.float32(1.44269504088896341))
    rest = x - n * np.float32(0.693359375)
    rest = rest - n * np.float32(-2.12194440e-4)
    power = np.float32(1.9875691500e-4)
    power = power * rest + np.float32(1.3981999507e-3)
    power = power * rest + np.float32(8.3334519073e-3)
    power = power * rest + np.float32(4.1665795894e-2)
    power = power * rest + np.float32(1.6666665459e-1)
    power = power * rest + np.float32(5.0000001201e-1)
    power = power * rest * rest + rest + np.float32(1.0)
    return power * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@_compiled(fastmath=_FASTMATH)
def _sum_rows(
    bits: Any, stride: int, peak_R: Any, starts_V: Any, inverse_C: Any, sums_RA: Any, start: int, end: int
) -> None:
    vocabulary = len(starts_V)
    least = np.float32(_UNDERFLOW)
    for r in range(start, end):
        row_V = bits[r * stride : r * stride + vocabulary]
        peak = peak_R[r]
        total_A = np.zeros(sums_RA.shape[1])
        for first in range(0, vocabulary, _BLOCK):
            part = row_V[first : first + _BLOCK]
            starts = starts_V[first : first + _BLOCK]
            mass = product = boundary = root = root_product = np.float32(0)
            for i in range(len(part)):
                x = max(_float(part[i]) - peak, least)
                half = _exp(x * np.float32(0.5)) if x > least else np.float32(0)
                e = half * half
                mass += e
                product += e * x
                boundary += e * np.float32(starts[i])
                root += half
                root_product += half * x
            total_A[sums.MASS] += mass
            total_A[sums.PRODUCT] += product
            total_A[sums.BOUNDARY] += boundary
            total_A[sums.ROOT] += root
            total_A[sums.ROOT_PRODUCT] += root_product
            for c in range(len(inverse_C)):
                if inverse_C[c] == np.float32(1):
                    total_A[sums.POWERS + c] += mass
                    continue
                power = np.float32(0)
                for i in range(len(part)):
                    scaled = max((_float(part[i]) - peak) * inverse_C[c], least / np.float32(2))
                    power += _exp(scaled) if scaled > least / np.float32(2) else np.float32(0)
                total_A[sums.POWERS + c] += power
        for column in range(len(total_A)):
            sums_RA[r, column] = total_A[column]


@_compiled()
def _find_best(bits: Any, stride: int, vocabulary: int, best_RK: Any, start: int, end: int) -> None:
    """Find the k largest of each row: they are in the groups whose maximum is at least the k-th largest maximum."""
    groups, k = vocabulary // _GROUP, best_RK.shape[1]
    max_G, key_K = np.empty(groups, np.int32), np.empty(k, np.int32)
    count_Z = np.empty(256, np.int32)
    for r in range(start, end):
        row_V = bits[r * stride : r * stride + vocabulary]
        max_G[:] = _LEAST_KEY
        for member in range(_GROUP):
            part = row_V[member * groups : (member + 1) * groups]
            for g in range(len(part)):
                max_G[g] = max(max_G[g], _key(part[g]))
        least = _kth_largest(max_G, k, count_Z)
        count = 0
        for g in range(groups):
            if max_G[g] >= least:
                for v in range(g, groups * _GROUP, groups):
                    count = _insert(_key(row_V[v]), v, least, key_K, best_RK[r], count)
        for v in range(groups * _GROUP, vocabulary):
            count = _insert(_key(row_V[v]), v, least, key_K, best_RK[r], count)


@_compiled()
def _kth_largest(max_G: Any, k: int, count_Z: Any) -> Any:
    """Return the k-th largest key with its low 16 bits cleared, by a radix select on the upper two bytes."""
    if len(max_G) < k:
        return np.int32(_LEAST_KEY)
    prefix, rank = 0, k
    for shift in (24, 16):
        count_Z[:] = 0
        for g in range(len(max_G)):
            place = np.int64(max_G[g]) - _LEAST_KEY
            if shift == 24 or place >> 24 == prefix:
                count_Z[(place >> shift) & 255] += 1
        digit = 255
        while count_Z[digit] < rank:
            rank -= count_Z[digit]
            digit -= 1
        prefix = (prefix << 8) | digit
    return np.int32((prefix << 16) + _LEAST_KEY)


@_compiled()
def _insert(key: Any, v: int, least: Any, key_K: Any, id_K: Any, count: int) -> int:
    """Insert an id into the k largest so far: by falling key, equal keys by rising id. Return their number."""
    last = count - 1
    if key < least or (count == len(key_K) and (key < key_K[last] or (key == key_K[last] and v > id_K[last]))):
        return count
    at = min(count, len(key_K) - 1)
    while at > 0 and (key > key_K[at - 1] or (key == key_K[at - 1] and v < id_K[at - 1])):
        key_K[at], id_K[at] = key_K[at - 1], id_K[at - 1]
        at -= 1
    key_K[at], id_K[at] = key, v
    return min(count + 1, len(key_K))
