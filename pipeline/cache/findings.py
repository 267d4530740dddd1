"""What `verify` finds: each finding named, placed, and weighed."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from pipeline.cache.audit import Audit
from pipeline.errors import ExitCode

Weight: TypeAlias = Literal["damage", "incomplete", "note"]

KINDS: dict[str, tuple[Weight, str]] = {
    "identity": ("damage", "cache.json or teacher.json is not what was written"),
    "plan": ("damage", "the unit list cannot be read, or is not what was written"),
    "manifest": ("damage", "the manifest is not what the commits say"),
    "commit": ("damage", "a commit cannot be read, or is of no planned unit"),
    "missing": ("damage", "a committed shard is not there"),
    "renamed": ("damage", "a committed shard is there under another name"),
    "swapped": ("damage", "a shard's file holds another unit's shard"),
    "truncated": ("damage", "a shard is shorter than what was committed"),
    "bytes": ("damage", "a shard's sha256 is not the committed one"),
    "page": ("damage", "a page's checksum or its decoding fails"),
    "schema": ("damage", "a shard's columns are not those of the teacher's spec"),
    "foreign": ("damage", "a shard holds rows that the plan does not know"),
    "rows": ("damage", "a shard lacks rows, or has them twice or in another order"),
    "tokens": ("damage", "a row is of other tokens than the plan's, or its digest is wrong"),
    "values": ("damage", "a row's signals cannot be true"),
    "disagreement": ("damage", "fastparquet reads something else than pyarrow"),
    "lm_head": ("damage", "the LM head cannot be read or is of another shape"),
    "tokenizer": ("damage", "the tokenizer's files are not those of the identity"),
    "quarantine": ("damage", "the reason for a quarantined row cannot be read"),
    "uncommitted": ("incomplete", "a unit has not been captured"),
    "quarantined": ("incomplete", "a row that the teacher could not process"),
    "no_manifest": ("incomplete", "the manifest has not been written"),
    "unlisted": ("note", "a file that belongs to no commit"),
    "unwitnessed": ("note", "fastparquet is not installed"),
}
"""Every kind of finding, how much it weighs, and what it means."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be. Row groups and rows count from 0, rows through the whole shard."""

    kind: str
    """One of KINDS."""
    message: str
    shard: str | None = None
    row_group: int | None = None
    row: int | None = None

    @property
    def weight(self) -> Weight:
        """`damage`, `incomplete` or `note`."""
        return KINDS[self.kind][0]

    def __str__(self) -> str:
        """`damage page: data/x.parquet row group 0 row 3: what is wrong`."""
        named = (("", self.shard), ("row group ", self.row_group), ("row ", self.row))
        place = " ".join(f"{name}{value}" for name, value in named if value is not None)
        return f"{self.weight} {self.kind}: {place + ': ' if place else ''}{self.message}"


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` says of a cache."""

    cache: str
    findings: tuple[Finding, ...]
    units: int
    """Planned."""
    shards: int
    """Read."""
    rows: int
    """Read, in whole shards."""
    bytes: int
    witnessed: bool
    """Whether fastparquet has read every whole shard too."""
    audit: Audit | None = None

    @property
    def damaged(self) -> bool:
        """Whether any finding is damage."""
        return any(finding.weight == "damage" for finding in self.findings)

    @property
    def complete(self) -> bool:
        """Whether every planned row has been captured and the manifest is written."""
        return not any(finding.weight == "incomplete" for finding in self.findings)

    @property
    def exit_code(self) -> ExitCode:
        """Damage before incompleteness; notes are neither."""
        if self.damaged:
            return ExitCode.FAILED
        return ExitCode.DONE if self.complete else ExitCode.INCOMPLETE

    def as_json(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        findings = [{"weight": finding.weight, **asdict(finding)} for finding in self.findings]
        counts = {"units": self.units, "shards": self.shards, "rows": self.rows, "bytes": self.bytes}
        state = {"damaged": self.damaged, "complete": self.complete, "witnessed": self.witnessed}
        audit = None if self.audit is None else self.audit.as_json()
        outcome = {"exit_code": int(self.exit_code), "findings": findings, "audit": audit}
        return {"cache": self.cache, **state, **counts, **outcome}

    def __str__(self) -> str:
        """The report as a terminal shows it: findings first, then the sum, then the audit."""
        state = "damaged" if self.damaged else "whole" if self.complete else "undamaged but incomplete"
        readers = "pyarrow and fastparquet" if self.witnessed else "pyarrow"
        size = f"{self.rows} rows in {self.shards} of {self.units} shards, {self.bytes / 1e6:.1f} MB"
        lines = [*map(str, self.findings), f"cache {self.cache} is {state}: {size}, read with {readers}"]
        return "\n".join(lines if self.audit is None else [*lines, str(self.audit)])
