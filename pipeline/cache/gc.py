"""Removing what no commit names. Nothing else deletes from a cache, but the loser of a race its own file.

A file goes if it is older than a grace period, lies in `data/` without a commit that names it, or was never finished.
The grace period must be longer than any attempt takes from its write to its commit: a day by default.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.commit import read_commit, read_commits
from pipeline.cache.description import read_identity
from pipeline.cache.storage import layout
from pipeline.cache.storage.store import Store
from pipeline.errors import StorageError, UsageError

GRACE_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Garbage:
    """What a collection found."""

    removed: tuple[str, ...]
    """Paths that were removed, or would be in a dry run."""
    removed_bytes: int
    too_young: tuple[str, ...]
    """Paths that no commit names and whose grace period has not passed."""
    dry_run: bool

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def __str__(self) -> str:
        verb = "would remove" if self.dry_run else "removed"
        total = f"{verb} {len(self.removed)} files that no commit names, {self.removed_bytes:,} bytes"
        if not self.removed:
            total = "nothing to remove: every shard is named by a commit, and none was left unfinished"
        if self.too_young:
            total = total if self.removed else "nothing to remove yet"
            total += f"; {len(self.too_young)} files that no commit names are younger than the grace period"
        return "\n".join([*(f"{verb} {path}" for path in self.removed), total])


def collect_garbage(cache: str | Path | Store, *, grace_s: float = GRACE_S, dry_run: bool = False) -> Garbage:
    """Remove what no commit names and is older than `grace_s`.

    Raises StorageError where the place is no cache, DamageError (and removes nothing) where a commit is unreadable.
    """
    if not grace_s >= 0.0:
        raise UsageError(f"grace period: expected 0 or more seconds, got {grace_s}")
    store = Store.open(cache)
    read_identity(store)
    unnamed = list(_unnamed(store))
    sizes = {path: store.size(path) for path in unnamed if _is_old(store, path, grace_s)}
    removed = [path for path in sizes if dry_run or _remove(store, path, grace_s)]
    young = [path for path in unnamed if path not in sizes]
    return Garbage(tuple(removed), sum(sizes[path] for path in removed), tuple(young), dry_run)


def _unnamed(store: Store) -> Iterator[str]:
    """Files are listed before the commits are: one that is committed meanwhile is never taken for garbage."""
    files = store.list(layout.DATA)
    named = {commit.file for commit in read_commits(store)}
    yield from (path for path in files if path not in named)
    yield from store.leftovers()


def _remove(store: Store, path: str, grace_s: float) -> bool:
    """Look once more before it is gone: an attempt with the same content may have put the file again."""
    unit_id = path.removeprefix(f"{layout.DATA}/").rpartition("-")[0]
    commit = read_commit(store, unit_id) if layout.is_unit(unit_id) else None
    spared = (commit is not None and commit.file == path) or not _is_old(store, path, grace_s)
    if not spared:
        store.delete(path)
    return not spared


def _is_old(store: Store, path: str, grace_s: float) -> bool:
    try:
        return time.time() - store.modified_s(path) >= grace_s
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return False  # its writer has finished or removed it meanwhile
        raise
