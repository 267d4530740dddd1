"""What is always true of a row's signals, whatever the teacher: this finds what an engine or a codec did wrong."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.format.codecs import wrong_mass
from pipeline.cache.format.codecs.mass import MASS_TOLERANCE
from pipeline.cache.format.schema import ShardSpec
from pipeline.contracts import Bf16Array, FloatArray, Signals, TargetMode, TokenSequence

LOG_TOLERANCE = 1e-3
"""How far above 0 rounding may lift a log-probability, in nats."""
ENTROPY_TOLERANCE = 0.02
"""How far above log V rounding to float16 may lift an entropy, in nats."""


def impossible_signals(signals: Signals, spec: ShardSpec) -> Iterator[str]:
    """One line for every law that the signals of a sequence break, with the first position that does."""
    kept_TK = signals.entry_logweight_TK > -np.inf
    yield from _ids(signals.entry_id_TK, kept_TK, spec.vocabulary)
    yield from _weights(signals, kept_TK)
    yield from _mass(signals, spec)
    yield from _scalars(signals, spec)
    for name, state in (("hidden states", signals.hidden_TLD), ("exact hidden state", signals.exact_hidden_TD)):
        if state is not None:
            yield from _first(_not_finite_bf16(state), f"{name}: expected finite values")


def impossible_mass(columns: Mapping[str, Any], rows: int, spec: ShardSpec) -> Iterator[str]:
    """A line if stored weights, before the decoder scales them, cannot sum to what the tail leaves."""
    wrong_T, mass_T = wrong_mass(columns, rows, spec)
    yield from _first(wrong_T, "entry weights as stored: expected what the tail leaves of 1 for their mass", mass_T)


def differences(stored: TokenSequence, planned: TokenSequence) -> Iterator[str]:
    """One line for every field in which a row is of another sequence than the plan's."""
    for name in ("sequence_id", "document_id", "domain", "split", "byte_start", "audited"):
        if getattr(stored, name) != getattr(planned, name):
            yield f"{name}: expected {getattr(planned, name)!r}, got {getattr(stored, name)!r}"
    for name in ("input_ids_N", "loss_mask_N", "byte_end_N"):
        if not np.array_equal(getattr(stored, name), getattr(planned, name)):
            yield f"{name}: not the plan's"


def _ids(entry_id_TK: NDArray[np.int32], kept_TK: NDArray[np.bool_], vocabulary: int) -> Iterator[str]:
    outside_TK = (entry_id_TK < 0) | (entry_id_TK >= vocabulary)
    yield from _first(outside_TK.any(axis=1), f"entry ids: expected 0..{vocabulary - 1}")
    stand_ins_K = -1 - np.arange(entry_id_TK.shape[1])  # padding counts as different from everything
    sorted_TK = np.sort(np.where(kept_TK, entry_id_TK, stand_ins_K), axis=1)
    yield from _first((np.diff(sorted_TK, axis=1) == 0).any(axis=1), "entry ids: expected every id once")


def _weights(signals: Signals, kept_TK: NDArray[np.bool_]) -> Iterator[str]:
    logweight_TK = signals.entry_logweight_TK
    yield from _first(_wrong_log(logweight_TK).any(axis=1), "entry log-weights: expected finite values up to 0")
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
        missed_T = np.isneginf(signals.entry_logweight_TK).any(axis=1) & (signals.tail_logmass_T > -np.inf)
        yield from _first(missed_T, "draws: expected all of them in a row with room for more entries")
    if spec.capture.mode in (TargetMode.UNBIASED, TargetMode.SAMPLED):
        yield from _first(mass_T < 1.0 - MASS_TOLERANCE, "mass of entries: expected 1", mass_T)


def _scalars(signals: Signals, spec: ShardSpec) -> Iterator[str]:
    tail_T, label_T, entropy_T = signals.tail_logmass_T, signals.label_logprob_T, signals.entropy_T
    yield from _first(_wrong_log(tail_T), "tail log-mass: expected at most 0", tail_T)
    yield from _first(
        _wrong_log(label_T) | np.isinf(label_T), "label log-prob: expected a finite value up to 0", label_T
    )
    most = float(np.log(spec.vocabulary)) + ENTROPY_TOLERANCE
    yield from _first(~((entropy_T >= -LOG_TOLERANCE) & (entropy_T <= most)), "entropy: expected 0..log V", entropy_T)
    partitions = (("log-partition", signals.log_partition_TC), ("tail's shape", signals.tail_shape_T3))
    for name, values in partitions:
        if values is not None and values.size:
            yield from _first(~np.isfinite(values).all(axis=1), f"{name}: expected finite values")
    if signals.boundary_logmass_T is not None:
        boundary_T = signals.boundary_logmass_T
        yield from _first(_wrong_log(boundary_T), "boundary log-mass: expected at most 0", boundary_T)


def _wrong_log(values: FloatArray) -> NDArray[np.bool_]:
    """Where a log-probability is NaN or above 0."""
    wrong: NDArray[np.bool_] = ~(values <= LOG_TOLERANCE)
    return wrong


def _not_finite_bf16(state: Bf16Array) -> NDArray[np.bool_]:
    """Rows of a state that hold an infinity or NaN: all exponent bits set."""
    wrong_T: NDArray[np.bool_] = ((state & 0x7F80) == 0x7F80).reshape(len(state), -1).any(axis=1)
    return wrong_T


def _first(wrong_T: Any, expected: str, got_T: NDArray[np.floating] | None = None) -> Iterator[str]:
    """The first position of a mask [T] (numpy's reductions have no better type than Any), with its value."""
    if wrong_T.any():
        position = int(np.argmax(wrong_T))
        got = "" if got_T is None else f", got {got_T[position]:.6g}"
        yield f"position {position}: {expected}{got}"
