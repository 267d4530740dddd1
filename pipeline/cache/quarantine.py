"""Records of sequences that a teacher could not process. Their unit's commit lists the ids; a record has the reason."""

import json
from dataclasses import asdict, dataclass

from pipeline.cache.damage import damage_if_invalid
from pipeline.cache.storage import layout
from pipeline.cache.storage.store import Store
from pipeline.identity import canonical_json


@dataclass(frozen=True, slots=True)
class QuarantineEntry:
    """One sequence that has no row in the cache."""

    sequence_id: str
    unit_id: str
    reason: str
    """stillhouse's own description."""
    engine_message: str
    """The engine's error message, one line."""


def record(store: Store, sequence_id: str, unit_id: str, reason: str, engine_message: str) -> None:
    """Write an entry, before the unit is committed without the sequence. The first entry of a sequence is kept."""
    entry = QuarantineEntry(sequence_id, unit_id, reason, " ".join(engine_message.split()))
    store.put_if_absent(layout.quarantine_path(sequence_id), canonical_json(asdict(entry)).encode())


def entries(store: Store) -> list[QuarantineEntry]:
    """Read all entries, by sequence id. Raises DamageError where one is invalid.

    An attempt that crashes between entry and commit leaves an entry although a later attempt may score the sequence:
    what is quarantined is defined by the commits (`Manifest.quarantined`).
    """
    paths = store.list(layout.QUARANTINE)
    return [_parse(store, path, data) for path, data in zip(paths, store.read_many(paths), strict=True)]


def _parse(store: Store, path: str, data: bytes) -> QuarantineEntry:
    with damage_if_invalid(f"quarantine entry {store.where(path)}"):
        return QuarantineEntry(**json.loads(data))
