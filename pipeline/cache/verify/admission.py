"""May a student train from this cache? Asked once, before anything is started; every no says why."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.cache.faithfulness import read_verdict
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage import layout
from pipeline.cache.verify.audit import MAX_KL, MAX_LABEL_ERROR, Audit, audit_cache
from pipeline.contracts import TargetMode
from pipeline.errors import AdmissionError, DamageError, StorageError

HASHED_BYTES = 2 << 30
"""Shards are hashed up to this many bytes, the others only looked at: each is hashed when training reads it."""
AUDITED_POSITIONS = 64
MASS_UNITS = 8
"""Units from which the captured mass is estimated, spread over the cache."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What was found about a cache that may be trained from."""

    units: int
    quarantined: int
    captured_mass: float
    """Mean share of the teacher's probability that the entries hold; 1 in the sampling modes."""
    audit: Audit | None
    """None where the cache keeps nothing to audit."""


def admit(
    reader: CacheReader,
    *,
    tokenizer_digest: str | None = None,
    vocabulary: int | None = None,
    min_captured_mass: float = 0.0,
) -> Admission:
    """Raise AdmissionError unless the cache is complete, undamaged, of that tokenizer and vocabulary, and true.

    `tokenizer_digest` and `vocabulary` are the student's; None asks nothing. Quarantined rows are no obstacle, nor is
    it that nobody has compared the cache with its live teacher; that it was found unfaithful then is.
    """
    where = f"cache {reader.store.uri}"
    _complete(reader, where)
    _same_words(reader, where, tokenizer_digest, vocabulary)
    try:
        _faithful(reader, where)
        _undamaged(reader)
        mass = _captured_mass(reader)
        audit = _audit(reader)
    except (DamageError, StorageError) as error:
        raise AdmissionError(f"{where} is damaged: {error}; run: stillhouse verify {reader.store.uri}") from error
    if mass < min_captured_mass:
        raise AdmissionError(
            f"{where}: entries hold {mass:.3f} of the teacher's probability on average, "
            f"training.min_captured_mass asks for {min_captured_mass}; capture with a larger k"
        )
    if audit is not None:
        _true(audit, where)
    return Admission(len(reader.manifest.commits), len(reader.manifest.quarantined), mass, audit)


def _complete(reader: CacheReader, where: str) -> None:
    planned = reader.units.unit_ids()
    missing = [unit_id for unit_id in planned if unit_id not in reader.manifest.by_unit]
    if missing:
        raise AdmissionError(
            f"{where} is incomplete: {len(missing)} of {len(planned)} units are not captured, as {missing[0]}; "
            f"run: stillhouse capture"
        )


def _same_words(reader: CacheReader, where: str, tokenizer_digest: str | None, vocabulary: int | None) -> None:
    stored = reader.identity.fields.get("tokenizer")
    if tokenizer_digest is not None and tokenizer_digest != stored:
        raise AdmissionError(f"{where}: expected the student's tokenizer {tokenizer_digest}, got {stored}")
    if vocabulary is not None and vocabulary != reader.spec.vocabulary:
        raise AdmissionError(f"{where}: expected the student's vocabulary {vocabulary}, got {reader.spec.vocabulary}")


def _faithful(reader: CacheReader, where: str) -> None:
    verdict = read_verdict(reader.store)
    if verdict is not None and not verdict.usable:
        raise AdmissionError(
            f"{where} is not faithful to its teacher, as the capture has found: {verdict.why}; "
            f"check the teacher, then capture into another storage"
        )


def _undamaged(reader: CacheReader) -> None:
    """Every shard is there in its size, and the first ones with their sha256. Raises DamageError, StorageError."""
    hashed = 0
    for commit in reader.manifest.commits:
        hashed += commit.bytes
        if hashed <= HASHED_BYTES:
            reader.shard(commit.unit_id)
        elif reader.store.size(commit.file) != commit.bytes:
            raise DamageError(f"shard {commit.file}: expected {commit.bytes} bytes")


def _captured_mass(reader: CacheReader) -> float:
    if reader.spec.capture.mode in (TargetMode.UNBIASED, TargetMode.SAMPLED):
        return 1.0
    tails = list(_tail_masses(reader))
    return 1.0 - float(np.concatenate(tails).mean()) if tails else 1.0


def _tail_masses(reader: CacheReader) -> Iterator[np.ndarray[tuple[int], np.dtype[np.float64]]]:
    unit_ids = reader.unit_ids("train") or reader.unit_ids()
    for unit_id in unit_ids[:: max(1, len(unit_ids) // MASS_UNITS)]:
        for row in reader.unit_rows(unit_id):
            yield np.exp(row.signals.tail_logmass_T.astype(np.float64))


def _audit(reader: CacheReader) -> Audit | None:
    if not reader.store.exists(layout.LM_HEAD):
        return None
    try:
        return audit_cache(reader, max_positions=AUDITED_POSITIONS)
    except AdmissionError:
        return None  # no audited sequence: nothing to hold it against


def _true(audit: Audit, where: str) -> None:
    kl = audit.targets[0].kl
    if audit.label_error > MAX_LABEL_ERROR:
        raise AdmissionError(
            f"{where} is not true to its teacher: label log-probs are off by {audit.label_error:.3f} nats on average, "
            f"expected at most {MAX_LABEL_ERROR}; run: stillhouse verify --audit"
        )
    if kl is not None and kl > MAX_KL:
        raise AdmissionError(
            f"{where} is not true to its teacher: KL of the exact to the kept distribution is {kl:.3f} nats, "
            f"expected at most {MAX_KL}; run: stillhouse verify --audit"
        )
