"""Why a teacher could not process a sequence. The unit's commit says that it has no row; this says why."""

import json
from dataclasses import asdict, dataclass

from pipeline.cache.storage import layout
from pipeline.cache.storage.store import Store
from pipeline.errors import DamageError
from pipeline.identity import canonical_json


@dataclass(frozen=True, slots=True)
class QuarantineEntry:
    """One sequence that stays out of the cache."""

    sequence_id: str
    unit_id: str
    reason: str
    """In our words."""
    engine_message: str
    """The engine's last words, one line."""


def record(store: Store, sequence_id: str, unit_id: str, reason: str, engine_message: str) -> None:
    """Write down why, before the unit is committed without the sequence. The first reason stays."""
    entry = QuarantineEntry(sequence_id, unit_id, reason, " ".join(engine_message.split()))
    store.put_if_absent(layout.quarantine_path(sequence_id), canonical_json(asdict(entry)).encode())


def entries(store: Store) -> list[QuarantineEntry]:
    """All entries, by sequence id. Raises DamageError where one is unreadable.

    An attempt that died between its entry and its commit may leave an entry of a sequence that a later attempt could
    process: the commits decide (`Manifest.quarantined`).
    """
    paths = store.list(layout.QUARANTINE)
    return [_parse(store, path, data) for path, data in zip(paths, store.read_many(paths), strict=True)]


def _parse(store: Store, path: str, data: bytes) -> QuarantineEntry:
    try:
        return QuarantineEntry(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise DamageError(f"quarantine entry {store.where(path)}: not what was written: {error!r}") from error
