"""Part 2: capture's reduction of logits to signals, beside torch's own operations and beside top-k and log-sum-exp.

    fused              the Triton kernel's path, `actors.signals.fused`
    eager              the same signals in torch's operations
    topk + logsumexp   torch.topk and torch.logsumexp alone: less than the signals
    fused: best ids    of the fused path, the search for the k largest alone
    fused: sums        of the fused path, the kernel's one read of the logits alone

One call goes over all rows in chunks. `B/s` counts one read of the logits, the least that any way has to move, so a way
that reads them twice can reach half of the card's bandwidth at most. The bandwidth is that of a copy, measured.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actors.signals import fused, kernels_gpu
from actors.signals.entries import best_ids
from actors.signals.fused import fused_signals
from actors.signals.reduce import eager_signals
from actors.signals.reference import reference_signals
from gpu.records import Records
from gpu.timing import copy_bytes_per_s, device, interleaved_ms, peak_bytes
from pipeline.contracts import CaptureSpec

LEAST_BANDWIDTH = 0.5
MOST_ERROR = 1e-4
"""Nats, against float64: sums over 150,000 float32 terms."""
COLUMNS = {
    "entry_logweight_RK": "entry_logweight_TK",
    "tail_logmass_R": "tail_logmass_T",
    "label_logprob_R": "label_logprob_T",
    "entropy_R": "entropy_T",
    "log_partition_RC": "log_partition_TC",
    "tail_shape_R3": "tail_shape_T3",
}


@dataclass(frozen=True)
class Sizes:
    """Rows of one call, rows of a chunk, and what else is varied."""

    rows: int
    chunk_rows: tuple[int, ...]
    vocabularies: tuple[int, ...]
    ks: tuple[int, ...]
    checked_rows: int
    rounds: int
    copy_bytes: int


FULL = Sizes(4096, (4096, 256), (151_936, 49_152), (64, 128), 16, 7, 2**31)
TINY = Sizes(6, (6, 3), (640,), (4, 8), 3, 2, 2**20)


def run(records: Records, tiny: bool) -> None:
    """Measure every vocabulary, k and chunk, and hold the values against float64."""
    sizes = TINY if tiny else FULL
    with _kernels_for_a_gpu():
        _run(records, sizes)


@contextmanager
def _kernels_for_a_gpu() -> Iterator[None]:
    """Have the fused path take the Triton kernels on a CPU too, where Triton's interpreter runs them."""
    original = fused.kernels
    fused.kernels = lambda device: kernels_gpu
    try:
        yield
    finally:
        fused.kernels = original


def _run(records: Records, sizes: Sizes) -> None:
    bandwidth = copy_bytes_per_s(sizes.copy_bytes)
    for vocabulary in sizes.vocabularies:
        logits_RV = torch.randn(sizes.rows, vocabulary, device=device()).mul_(3).bfloat16()
        label_R = torch.randint(vocabulary, (sizes.rows,), device=device())
        for k in sizes.ks:
            for chunk_rows in sizes.chunk_rows:
                case = f"V={vocabulary:,} k={k} chunks of {chunk_rows:,}"
                with records.guard(case):
                    _measure(records, case, logits_RV, label_R, k, chunk_rows, bandwidth, sizes)
            with records.guard(f"V={vocabulary:,} k={k}, values"):
                _check(records, f"V={vocabulary:,} k={k}", logits_RV, label_R, k, sizes.checked_rows)


def _measure(
    records: Records, case: str, logits_RV: Tensor, label_R: Tensor, k: int, chunk_rows: int, bandwidth: float,
    sizes: Sizes,
) -> None:  # fmt: skip
    ways = _ways(logits_RV, label_R, CaptureSpec(k=k), chunk_rows)
    found_ms = interleaved_ms(ways, sizes.rounds, warm_up=2)
    for way, ms in found_ms.items():
        records.figure(
            case, way, ms=ms, rate=len(logits_RV) / (ms / 1000), unit="rows/s",
            ratio=ms / found_ms["topk + logsumexp"], to="topk + logsumexp", peak_bytes=peak_bytes(ways[way]),
            note=f"{logits_RV.nbytes / (ms / 1000) / bandwidth:.2f} of the bandwidth",
        )  # fmt: skip
    share = logits_RV.nbytes / (found_ms["fused"] / 1000) / bandwidth
    records.goal(case, "reduction, of the card's bandwidth", share, at_least=LEAST_BANDWIDTH)


def _ways(logits_RV: Tensor, label_R: Tensor, spec: CaptureSpec, chunk_rows: int) -> dict[str, Callable[[], object]]:
    peak_R = logits_RV.amax(1).float()
    chunks = [slice(start, start + chunk_rows) for start in range(0, len(logits_RV), chunk_rows)]

    def over_chunks(reduce: Callable[[slice], object]) -> Callable[[], object]:
        def call() -> None:
            for chunk in chunks:
                reduce(chunk)

        return call

    return {
        "fused": over_chunks(lambda c: fused_signals(logits_RV[c], label_R[c], spec, None)),
        "eager": over_chunks(lambda c: eager_signals(logits_RV[c], label_R[c], spec, None, None)),
        "topk + logsumexp": over_chunks(lambda c: (logits_RV[c].topk(spec.k), logits_RV[c].logsumexp(-1))),
        "fused: best ids": over_chunks(lambda c: best_ids(logits_RV[c], spec.k)),
        "fused: sums": over_chunks(lambda c: kernels_gpu.rest_sums(logits_RV[c], peak_R[c], spec, None)),
    }


def _check(records: Records, case: str, logits_RV: Tensor, label_R: Tensor, k: int, rows: int) -> None:
    spec = CaptureSpec(k=k, temperatures=(1.0, 2.0), any_temperature=True)
    logits_RV, label_R = logits_RV[:rows].clone(), label_R[:rows]
    reference = reference_signals(logits_RV.double().cpu().numpy(), label_R.cpu().numpy(), spec, "bench")
    for way, reduce in (("fused", fused_signals), ("eager", lambda *given: eager_signals(*given[:3], None, None))):
        found = reduce(logits_RV, label_R, spec, None)
        same = np.array_equal(found.entry_id_RK.cpu().numpy(), reference.entry_id_TK)
        error = max(_errors(found, reference))
        records.goal(case, f"{way}: largest error against float64, nats", error, at_most=MOST_ERROR)
        records.goal(case, f"{way}: kept ids equal those of float64", float(same), at_least=1.0)


def _errors(found: object, reference: object) -> Iterator[float]:
    for ours, theirs in COLUMNS.items():
        difference = getattr(found, ours).cpu().numpy() - getattr(reference, theirs)
        yield float(np.abs(difference).max())
