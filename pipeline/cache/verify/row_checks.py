"""Invariants of a row's signals that hold for every teacher; a violation is an error of an engine or a codec."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.format.codecs import wrong_mass
from pipeline.cache.format.codecs.mass import MASS_TOLERANCE
from pipeline.cache.format.schema import ShardSpec
from pipeline.contracts import Bf16Array, FloatArray, Signals, TargetMode, TokenSequence

LOG_TOLERANCE = 1e-3
"""Nats by which rounding may raise a log-probability above 0."""
ENTROPY_TOLERANCE = 0.02
"""Nats by which rounding to float16 may raise an entropy above log V."""


def violated_invariants(signals: Signals, spec: ShardSpec) -> Iterator[str]:
    """Yield a message for each invariant that the signals of a sequence violate, with the first position."""
    kept_TK = signals.entry_logweight_TK > -np.inf
    yield from _ids(signals.entry_id_TK, kept_TK, spec.vocabulary)
    yield from _weights(signals, kept_TK)
    yield from _mass(signals, spec)
    yield from _scalars(signals, spec)
    for name, state in (("hidden states", signals.hidden_TLD), ("exact hidden state", signals.exact_hidden_TD)):
        if state is not None:
            yield from _first(_nonfinite_rows(state), f"{name}: expected finite values")


def violated_mass(columns: Mapping[str, Any], rows: int, spec: ShardSpec) -> Iterator[str]:
    """Yield a message if the stored weights, before the decoder normalises them, do not sum to 1 with the tail."""
    invalid_T, mass_T = wrong_mass(columns, rows, spec)
    yield from _first(invalid_T, "mass of stored entry weights: expected 1 minus the tail's", mass_T)


def sequence_differences(stored: TokenSequence, expected: TokenSequence) -> Iterator[str]:
    """Yield a message for each field in which a row's sequence differs from the unit list's."""
    for name in ("sequence_id", "document_id", "domain", "split", "byte_start", "audited"):
        if getattr(stored, name) != getattr(expected, name):
            yield f"{name}: expected {getattr(expected, name)!r}, got {getattr(stored, name)!r}"
    for name in ("input_ids_N", "loss_mask_N", "byte_end_N"):
        if not np.array_equal(getattr(stored, name), getattr(expected, name)):
            yield f"{name}: differs from the unit list"


def _ids(entry_id_TK: NDArray[np.int32], kept_TK: NDArray[np.bool_], vocabulary: int) -> Iterator[str]:
    outside_TK = (entry_id_TK < 0) | (entry_id_TK >= vocabulary)
    yield from _first(outside_TK.any(axis=1), f"entry ids: expected 0..{vocabulary - 1}")
    distinct_K = -1 - np.arange(entry_id_TK.shape[1])  # in place of padding, which is no duplicate
    sorted_TK = np.sort(np.where(kept_TK, entry_id_TK, distinct_K), axis=1)
    yield from _first((np.diff(sorted_TK, axis=1) == 0).any(axis=1), "entry ids: expected every id once")


def _weights(signals: Signals, kept_TK: NDArray[np.bool_]) -> Iterator[str]:
    logweight_TK = signals.entry_logweight_TK
    yield from _first(_not_logprob(logweight_TK).any(axis=1), "entry log-weights: expected finite values up to 0")
    yield from _first(~kept_TK.any(axis=1), "entries: expected at least one")
    with np.errstate(invalid="ignore"):
        falling_TK = logweight_TK[:, 1:] <= logweight_TK[:, :-1]
        tied_TK = (logweight_TK[:, 1:] == logweight_TK[:, :-1]) & kept_TK[:, 1:]
    yield from _first((~falling_TK).any(axis=1), "entry log-weights: expected them to fall along a row")
    rising_ids_TK = signals.entry_id_TK[:, 1:] > signals.entry_id_TK[:, :-1]
    yield from _first((tied_TK & ~rising_ids_TK).any(axis=1), "entries of equal weight: expected the lower id first")


def _mass(signals: Signals, spec: ShardSpec) -> Iterator[str]:
    with np.errstate(over="ignore", invalid="ignore"):
        mass_T = np.exp(signals.entry_logweight_TK.astype(np.float64)).sum(axis=1)
        mass_T += np.exp(signals.tail_logmass_T.astype(np.float64))
    yield from _first(mass_T > 1.0 + MASS_TOLERANCE, "mass of entries and tail: expected at most 1", mass_T)
    if spec.capture.mode is TargetMode.SAMPLED:
        lost_T = np.isneginf(signals.entry_logweight_TK).any(axis=1) & (signals.tail_logmass_T > -np.inf)
        yield from _first(lost_T, "draws: expected no tail in a row of fewer than k entries")
    if spec.capture.mode in (TargetMode.UNBIASED, TargetMode.SAMPLED):
        yield from _first(mass_T < 1.0 - MASS_TOLERANCE, "mass of entries: expected 1", mass_T)


def _scalars(signals: Signals, spec: ShardSpec) -> Iterator[str]:
    tail_T, label_T, entropy_T = signals.tail_logmass_T, signals.label_logprob_T, signals.entropy_T
    yield from _first(_not_logprob(tail_T), "tail log-mass: expected at most 0", tail_T)
    yield from _first(
        _not_logprob(label_T) | np.isinf(label_T), "label log-prob: expected a finite value up to 0", label_T
    )
    max_entropy = float(np.log(spec.vocabulary)) + ENTROPY_TOLERANCE
    yield from _first(
        ~((entropy_T >= -LOG_TOLERANCE) & (entropy_T <= max_entropy)), "entropy: expected 0..log V", entropy_T
    )
    partitions = (("log-partition", signals.log_partition_TC), ("tail shape", signals.tail_shape_T3))
    for name, values in partitions:
        if values is not None and values.size:
            yield from _first(~np.isfinite(values).all(axis=1), f"{name}: expected finite values")
    if signals.boundary_logmass_T is not None:
        boundary_T = signals.boundary_logmass_T
        yield from _first(_not_logprob(boundary_T), "boundary log-mass: expected at most 0", boundary_T)


def _not_logprob(values: FloatArray) -> NDArray[np.bool_]:
    invalid: NDArray[np.bool_] = ~(values <= LOG_TOLERANCE)  # true for NaN
    return invalid


def _nonfinite_rows(state: Bf16Array) -> NDArray[np.bool_]:
    """Return the mask [T] of states with an infinity or NaN, whose bfloat16 exponent bits are all 1."""
    invalid_T: NDArray[np.bool_] = ((state & 0x7F80) == 0x7F80).reshape(len(state), -1).any(axis=1)
    return invalid_T


def _first(invalid_T: Any, expected: str, got_T: NDArray[np.floating] | None = None) -> Iterator[str]:
    """Yield a message with the first position of a mask [T] and its value. numpy's reductions are typed as Any."""
    if invalid_T.any():
        position = int(np.argmax(invalid_T))
        got = "" if got_T is None else f", got {got_T[position]:.6g}"
        yield f"position {position}: {expected}{got}"
