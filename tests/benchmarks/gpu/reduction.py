"""Part `reduction`: logits to signals, compared with eager torch and with top-k and log-sum-exp alone.

    fused              the signals by Triton kernels, `actors.signals.fused`
    eager              the same signals by torch operations
    topk + logsumexp   torch.topk and torch.logsumexp only: a part of the signals
    fused: best ids    of `fused`, the search for the k largest only
    fused: sums        of `fused`, the Triton kernel only

A call covers all rows, in chunks. The share of the bandwidth counts the bytes of one read of the logits, the least that
any variant moves, against the bandwidth of a copy measured here. `fused` reads the logits twice by design (READS), so
its note also has the share that counts both reads; the goal is for one.
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

MIN_BANDWIDTH_SHARE = 0.5
MAX_ERROR = 1e-4
"""Nats, against float64: sums over 150,000 float32 terms."""
READS = {"fused": 2, "fused: best ids": 1, "fused: sums": 1}
"""Reads of all logits by design: one for the k largest, one for the sums. Torch's kernels read more than once."""
COLUMNS = {
    "entry_logweight_RK": "entry_logweight_TK",
    "tail_logmass_R": "tail_logmass_T",
    "label_logprob_R": "label_logprob_T",
    "entropy_R": "entropy_T",
    "log_partition_RC": "log_partition_TC",
    "tail_shape_R3": "tail_shape_T3",
}
"""Fields of `RowSignals`, and those of `Signals` that they are compared with."""


@dataclass(frozen=True)
class Sizes:
    """Rows of a call and of a chunk, vocabularies, k; rows compared with float64."""

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
    """Measure every vocabulary, k and chunk size, and compare the values with float64."""
    sizes = TINY if tiny else FULL
    with _gpu_kernels():
        _run(records, sizes)


@contextmanager
def _gpu_kernels() -> Iterator[None]:
    """Make `fused_signals` use the Triton kernels on a CPU too, in Triton's interpreter."""
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
                with records.catch_failure(case):
                    _measure(records, case, logits_RV, label_R, k, chunk_rows, bandwidth, sizes)
            with records.catch_failure(f"V={vocabulary:,} k={k}, values"):
                _check(records, f"V={vocabulary:,} k={k}", logits_RV, label_R, k, sizes.checked_rows)


def _measure(
    records: Records, case: str, logits_RV: Tensor, label_R: Tensor, k: int, chunk_rows: int, bandwidth: float,
    sizes: Sizes,
) -> None:  # fmt: skip
    variants = _variants(logits_RV, label_R, CaptureSpec(k=k), chunk_rows)
    found_ms = interleaved_ms(variants, sizes.rounds, warm_up=2)
    shares = {variant: logits_RV.nbytes / (ms / 1000) / bandwidth for variant, ms in found_ms.items()}
    for variant, ms in found_ms.items():
        records.figure(
            case, variant, ms=ms, rate=len(logits_RV) / (ms / 1000), unit="rows/s",
            ratio=ms / found_ms["topk + logsumexp"], to="topk + logsumexp", peak_bytes=peak_bytes(variants[variant]),
            note=_bandwidth_note(shares[variant], READS.get(variant)),
        )  # fmt: skip
    records.goal(
        case, "reduction: one read of the logits, of the bandwidth", shares["fused"], at_least=MIN_BANDWIDTH_SHARE,
        note=f"it reads them {READS['fused']} times by design: {READS['fused'] * shares['fused']:.3g} with all reads",
    )  # fmt: skip


def _bandwidth_note(share: float, reads: int | None) -> str:
    """Return the share of the bandwidth by one read of the logits, and by all reads if there are several."""
    by_one_read = f"{share:.2f} of the bandwidth by one read"
    if reads is None:
        return f"{by_one_read}; reads more than once"
    return by_one_read if reads == 1 else f"{by_one_read}; reads {reads} times by design: {reads * share:.2f}"


def _variants(
    logits_RV: Tensor, label_R: Tensor, spec: CaptureSpec, chunk_rows: int
) -> dict[str, Callable[[], object]]:
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
    found = {
        "fused": fused_signals(logits_RV, label_R, spec, None),
        "eager": eager_signals(logits_RV, label_R, spec, None, None),
    }
    for variant, signals in found.items():
        error = max(_errors(signals, reference))
        records.goal(case, f"{variant}: largest error to float64, nats", error, at_most=MAX_ERROR, is_numerical=True)
        same = np.array_equal(signals.entry_id_RK.cpu().numpy(), reference.entry_id_TK)
        records.goal(case, f"{variant}: kept ids equal float64's", float(same), at_least=1.0, is_numerical=True)


def _errors(found: object, reference: object) -> Iterator[float]:
    for ours, theirs in COLUMNS.items():
        difference = getattr(found, ours).cpu().numpy() - getattr(reference, theirs)
        yield float(np.abs(difference).max())
