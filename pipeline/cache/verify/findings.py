"""What `verify` finds: each finding named, placed, and weighed."""

from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import Any, Literal, TypeAlias

from pipeline.cache.faithfulness import Verdict
from pipeline.cache.storage import layout
from pipeline.cache.verify.audit import Audit
from pipeline.errors import ExitCode

Weight: TypeAlias = Literal["damage", "untrue", "incomplete", "note"]

REPAIR = (
    "to repair: put the damaged files of data/ back from a copy of the cache; or remove the commits/UNIT.json of each "
    "damaged unit, and run the same capture again"
)
SHOWN = 10
"""Findings of a kind that a terminal shows."""

KINDS: dict[str, tuple[Weight, str]] = {
    "identity": ("damage", "cache.json or teacher.json is not what was written, or is not there"),
    "unreadable": ("damage", "a file could not be read, so nothing is known of it"),
    "plan": ("damage", "the unit list cannot be read, or is not what was written"),
    "manifest": ("damage", "the manifest is not what the commits say"),
    "commit": ("damage", "a commit cannot be read, is of no planned unit, or says what its shard does not"),
    "missing": ("damage", "a committed shard is not there"),
    "renamed": ("damage", "a committed shard is there under another name"),
    "swapped": ("damage", "a shard's file holds another unit's shard"),
    "truncated": ("damage", "a shard is shorter than what was committed"),
    "bytes": ("damage", "a shard's sha256 is not the committed one"),
    "page": ("damage", "a page's checksum or its decoding fails"),
    "schema": ("damage", "a shard's columns are not those of the teacher's spec"),
    "foreign": ("damage", "a shard is another run's: by its commit's fingerprint, or by rows that the plan lacks"),
    "rows": ("damage", "a shard lacks rows, or has them twice or in another order"),
    "tokens": ("damage", "a row is of other tokens than the plan's, or its digest is wrong"),
    "values": ("damage", "a row's signals cannot be true"),
    "disagreement": ("damage", "fastparquet reads something else than pyarrow"),
    "unfaithful": ("untrue", "the capture found it further from the live teacher than noise and codec explain"),
    "faithfulness": ("damage", "the capture's verdict cannot be read"),
    "lm_head": ("damage", "the LM head is not what was written, is of another shape, or is not there"),
    "tokenizer": ("damage", "the tokenizer's files are not those of the identity"),
    "quarantine": ("damage", "the reason for a quarantined row cannot be read"),
    "uncommitted": ("incomplete", "a unit has not been captured"),
    "quarantined": ("incomplete", "a row that the teacher could not process"),
    "no_manifest": ("incomplete", "the manifest has not been written"),
    "not_checked": ("note", "nobody has compared it with the live teacher"),
    "unaudited": ("note", "an audit was asked for, and there is nothing to audit"),
    "unlisted": ("note", "a file that belongs to no commit, or to nothing here"),
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
        """`damage`, `untrue`, `incomplete` or `note`."""
        return KINDS[self.kind][0]

    @property
    def is_shards_damage(self) -> bool:
        """Whether it is a shard that is damaged: its unit can be captured anew."""
        in_data = (self.shard or "").startswith(f"{layout.DATA}/")
        return self.weight == "damage" and self.kind != "unreadable" and in_data

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
    verdict: Verdict | None = None
    """The capture's, None where nobody has compared the cache with the live teacher."""
    audit: Audit | None = None

    @property
    def damaged(self) -> bool:
        """Whether any finding is damage."""
        return any(finding.weight == "damage" for finding in self.findings)

    @property
    def untrue(self) -> bool:
        """Whether the capture found it unfaithful to its teacher."""
        return any(finding.weight == "untrue" for finding in self.findings)

    @property
    def complete(self) -> bool:
        """Whether every planned row has been captured and the manifest is written."""
        return not any(finding.weight == "incomplete" for finding in self.findings)

    @property
    def exit_code(self) -> ExitCode:
        """Damage and untruth before incompleteness; notes are neither."""
        if self.damaged or self.untrue:
            return ExitCode.FAILED
        return ExitCode.DONE if self.complete else ExitCode.INCOMPLETE

    def as_json(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        findings = [{"weight": finding.weight, **asdict(finding)} for finding in self.findings]
        counts = {"units": self.units, "shards": self.shards, "rows": self.rows, "bytes": self.bytes}
        state = {"damaged": self.damaged, "complete": self.complete, "witnessed": self.witnessed}
        audit = None if self.audit is None else self.audit.as_json()
        faithful = None if self.verdict is None else self.verdict.usable
        outcome = {"exit_code": int(self.exit_code), "faithful": faithful, "findings": findings, "audit": audit}
        return {"cache": self.cache, **state, **counts, **outcome}

    def __str__(self) -> str:
        """The report as a terminal shows it: what is wrong, the outcome, what was looked at, the audit."""
        parts = [*self._wrong(), self._outcome(), *self._looked_at()]
        return "\n".join(parts if self.audit is None else [*parts, str(self.audit)])

    def _wrong(self) -> list[str]:
        """The heaviest findings first, of each kind the first few, and how damaged shards are repaired."""
        lines: list[str] = []
        for kind, (weight, _) in KINDS.items():
            found = [finding for finding in self.findings if finding.kind == kind]
            lines += map(str, found[:SHOWN])
            if len(found) > SHOWN:
                lines.append(f"{weight} {kind}: {len(found) - SHOWN} more like these; --json lists all")
        return [*lines, REPAIR] if any(finding.is_shards_damage for finding in self.findings) else lines

    def _outcome(self) -> str:
        whole = "complete and undamaged" if self.complete else "undamaged but incomplete"
        untrue = ", but not faithful to its teacher" if self.untrue else ""
        heavy = sum(finding.weight == "damage" for finding in self.findings)
        state = f"DAMAGED: {heavy} findings" if self.damaged else whole + untrue
        return f"cache {self.cache} is {state}"

    def _looked_at(self) -> list[str]:
        size = f"{self.shards} of {self.units} shards, {self.rows} rows, {self.bytes / 1e6:.1f} MB"
        reader = "pyarrow and fastparquet" if self.witnessed else "pyarrow alone"
        agree = ", which agree value for value" if self.witnessed and not self.damaged else ""
        verdict = "not compared with the live teacher" if self.verdict is None else self.verdict.why
        return [
            f"  read      {size}, by {reader}{agree}",
            "  checked   sha256 of every file, page checksums, schema, rows against the plan token for token,",
            "            log-probs finite and sorted, mass 1 with the tail, ids in the vocabulary, LM head, tokenizer",
            *wrap(verdict, 110, initial_indent="  faithful  ", subsequent_indent=" " * 12, break_on_hyphens=False),
        ]
