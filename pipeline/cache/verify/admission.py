"""Admission of a cache for training: checked once, before any job starts; a refusal states its reason."""

from dataclasses import dataclass

import numpy as np

from pipeline.cache.faithfulness import read_verdict
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage import layout
from pipeline.cache.verify.audit import MAX_KL, MAX_LABEL_ERROR, Audit, audit_cache
from pipeline.errors import AdmissionError, DamageError, StorageError

HASHED_BYTES = 2 << 30
"""Shards are hashed up to this total, the others checked by size: training hashes each shard when it reads it."""
MAX_AUDITED_POSITIONS = 64
MASS_UNITS = 8
"""Number of units, spread over the cache, from which the captured mass is estimated."""


@dataclass(frozen=True, slots=True)
class Admission:
    """Summary of an admitted cache."""

    units: int
    quarantined: int
    captured_mass: float
    """Mean probability of the entries under the teacher; 1 in the sampling modes."""
    audit: Audit | None
    """None where the cache has no audited sequence or no LM head."""


def admit(
    reader: CacheReader,
    *,
    tokenizer_digest: str | None = None,
    vocabulary: int | None = None,
    min_captured_mass: float = 0.0,
) -> Admission:
    """Raise AdmissionError unless the cache is complete, undamaged, of that tokenizer and vocabulary, and faithful.

    `tokenizer_digest` and `vocabulary` are the student's; None skips the check. Caches with quarantined rows, and
    caches that were not compared with the live teacher, are admitted.
    """
    where = f"cache {reader.store.uri}"
    _check_complete(reader, where)
    _check_vocabulary(reader, where, tokenizer_digest, vocabulary)
    try:
        _check_faithful(reader, where)
        _check_shards(reader)
        mass = _captured_mass(reader)
        audit = _try_audit(reader)
    except (DamageError, StorageError) as error:
        raise AdmissionError(f"{where} is damaged: {error}; run: stillhouse verify {reader.store.uri}") from error
    if mass < min_captured_mass:
        raise AdmissionError(
            f"{where}: expected entries with at least {min_captured_mass} of the teacher's probability on average "
            f"(training.min_captured_mass), got {mass:.3f}; capture with a larger k"
        )
    if audit is not None:
        _check_audit(audit, where, reader.store.uri)
    return Admission(len(reader.manifest.commits), len(reader.manifest.quarantined), mass, audit)


def _check_complete(reader: CacheReader, where: str) -> None:
    planned = reader.units.unit_ids()
    missing = [unit_id for unit_id in planned if unit_id not in reader.manifest.by_unit]
    if missing:
        raise AdmissionError(
            f"{where} is incomplete: {len(missing)} of {len(planned)} units are not captured, such as {missing[0]}; "
            f"run: stillhouse capture"
        )


def _check_vocabulary(reader: CacheReader, where: str, tokenizer_digest: str | None, vocabulary: int | None) -> None:
    stored = reader.identity.fields.get("tokenizer")
    if tokenizer_digest is not None and tokenizer_digest != stored:
        raise AdmissionError(f"{where}: expected the student's tokenizer {tokenizer_digest}, got {stored}")
    if vocabulary is not None and vocabulary != reader.spec.vocabulary:
        raise AdmissionError(f"{where}: expected the student's vocabulary {vocabulary}, got {reader.spec.vocabulary}")


def _check_faithful(reader: CacheReader, where: str) -> None:
    verdict = read_verdict(reader.store)
    if verdict is not None and not verdict.usable:
        raise AdmissionError(
            f"{where} is not faithful to its teacher: {verdict.why}; "
            f"check the teacher, then capture into another storage"
        )


def _check_shards(reader: CacheReader) -> None:
    """Check the size of every shard, and the sha256 of the first ones. Raises DamageError, StorageError."""
    hashed = 0
    for commit in reader.manifest.commits:
        hashed += commit.bytes
        if hashed <= HASHED_BYTES:
            reader.shard(commit.unit_id)
        elif (size := reader.store.size(commit.file)) != commit.bytes:
            raise DamageError(f"shard {commit.file}: expected {commit.bytes} bytes, got {size}")


def _captured_mass(reader: CacheReader) -> float:
    if not reader.spec.has_tail:
        return 1.0
    unit_ids = reader.unit_ids("train") or reader.unit_ids()
    rows = (row for unit_id in unit_ids[:: max(1, len(unit_ids) // MASS_UNITS)] for row in reader.unit_rows(unit_id))
    tails = [np.exp(row.signals.tail_logmass_T.astype(np.float64)) for row in rows]
    return 1.0 - float(np.concatenate(tails).mean()) if tails else 1.0


def _try_audit(reader: CacheReader) -> Audit | None:
    if not reader.store.exists(layout.LM_HEAD):
        return None
    try:
        return audit_cache(reader, max_positions=MAX_AUDITED_POSITIONS)
    except AdmissionError:
        return None  # no audited sequence


def _check_audit(audit: Audit, where: str, uri: str) -> None:
    kl = audit.targets[0].kl
    if audit.label_error > MAX_LABEL_ERROR:
        raise AdmissionError(
            f"{where} deviates from its teacher: mean error of label log-probs is {audit.label_error:.3f} nats, "
            f"expected at most {MAX_LABEL_ERROR}; run: stillhouse verify --audit {uri}"
        )
    if kl is not None and kl > MAX_KL:
        raise AdmissionError(
            f"{where} deviates from its teacher: mean KL of the exact to the kept distribution is {kl:.3f} nats, "
            f"expected at most {MAX_KL}; run: stillhouse verify --audit {uri}"
        )
