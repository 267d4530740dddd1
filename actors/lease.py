"""What the supervisor and a teacher say to each other: a lease goes there, an outcome comes back. Small and plain."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arrival:
    """Where a replica has got its place."""

    pid: int
    node: str
    """The machine's id in the cluster."""


@dataclass(frozen=True, slots=True)
class Casualty:
    """A row that a teacher cannot process."""

    sequence_id: str
    reason: str
    """What was done about it, or how it was found."""
    engine_message: str
    """The engine's last words about it."""


@dataclass(frozen=True, slots=True)
class Lease:
    """One unit, lent to one replica at a time. Two leases of a unit do no harm: one commit wins."""

    unit_id: str
    rows: tuple[int, int] | None = None
    """A probe: score these rows (first, one past the last) and throw the result away."""
    casualties: tuple[Casualty, ...] = ()
    """Rows that are known to kill or hang an engine: they are quarantined, the others are captured."""
    check: bool = False
    """Compare the committed unit with the live engine, instead of capturing it."""
    closing: bool = False
    """No unit: write the manifest, now that every unit is committed, and choose the units to check."""
    one_by_one: bool = False
    """Score every row in a call of its own: no row kills alone, but together they do."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a lease that a teacher came back from; also what a probe and a warm-up took."""

    unit_id: str
    rows: int = 0
    tokens: int = 0
    stored_bytes: int = 0
    score_s: float = 0.0
    """Time at the engine."""
    store_s: float = 0.0
    """Encoding, hashing and upload, beside the next unit's prefill."""
    casualties: int = 0
    """Rows of this unit that are quarantined."""
