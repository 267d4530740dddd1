"""Garbage collection: deletes the files of `data/` that no commit names, and unfinished writes.

Both must be older than a grace period, which must exceed the time that any attempt takes from writing a shard to
committing it (default: one day). Nothing else deletes from a cache, except that a losing attempt deletes its own shard.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.cache.commit import read_commit, read_commits
from pipeline.cache.description import read_identity
from pipeline.cache.storage import layout
from pipeline.cache.storage.store import Store
from pipeline.errors import StorageError, UsageError

GRACE_S = 86_400.0


@dataclass(frozen=True, slots=True)
class GarbageReport:
    """The result of a collection."""

    removed: tuple[str, ...]
    """Paths that were removed, or that would be without `dry_run`."""
    removed_bytes: int
    too_young: tuple[str, ...]
    """Paths of garbage whose grace period has not passed."""
    dry_run: bool

    def __str__(self) -> str:
        verb = "would remove" if self.dry_run else "removed"
        total = f"{verb} {len(self.removed)} files that no commit names, {self.removed_bytes:,} bytes"
        if not self.removed:
            total = "nothing to remove: every shard has a commit, and there are no unfinished writes"
        if self.too_young:
            total = total if self.removed else "nothing to remove yet"
            total += f"; {len(self.too_young)} files that no commit names are younger than the grace period"
        return "\n".join([*(f"{verb} {path}" for path in self.removed), total])


def collect_garbage(cache: str | Path | Store, *, grace_s: float = GRACE_S, dry_run: bool = False) -> GarbageReport:
    """Delete files that no commit names and that are older than `grace_s` seconds.

    Raises UsageError for a negative grace period, StorageError where there is no cache, and DamageError (after deleting
    nothing) where a commit is invalid.
    """
    if not grace_s >= 0.0:
        raise UsageError(f"grace period: expected 0 or more seconds, got {grace_s}")
    store = Store.open(cache)
    read_identity(store)
    garbage = list(_garbage(store))
    sizes = {path: store.size(path) for path in garbage if _is_old(store, path, grace_s)}
    removed = [path for path in sizes if dry_run or _remove(store, path, grace_s)]
    young = [path for path in garbage if path not in sizes]
    return GarbageReport(tuple(removed), sum(sizes[path] for path in removed), tuple(young), dry_run)


def _garbage(store: Store) -> Iterator[str]:
    """List the files before the commits, so that a shard committed in between is not taken for garbage."""
    files = store.list(layout.DATA)
    committed = {commit.file for commit in read_commits(store)}
    yield from (path for path in files if path not in committed)
    yield from store.temporary_files()


def _remove(store: Store, path: str, grace_s: float) -> bool:
    """Check again, then delete: an attempt with the same content may have written the file anew."""
    unit_id = path.removeprefix(f"{layout.DATA}/").rpartition("-")[0]
    commit = read_commit(store, unit_id) if layout.is_unit(unit_id) else None
    if (commit is not None and commit.file == path) or not _is_old(store, path, grace_s):
        return False
    store.delete(path)
    return True


def _is_old(store: Store, path: str, grace_s: float) -> bool:
    try:
        return time.time() - store.modified_s(path) >= grace_s
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return False  # its writer has renamed or deleted it since the listing
        raise
