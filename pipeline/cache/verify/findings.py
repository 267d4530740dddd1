"""The findings of `verify`, with kind and severity, and its report."""

from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import Any, Literal, TypeAlias

from pipeline.cache.faithfulness import Verdict
from pipeline.cache.storage import layout
from pipeline.cache.verify.audit import Audit
from pipeline.errors import ExitCode

Severity: TypeAlias = Literal["damage", "unfaithful", "incomplete", "note"]

REPAIR = (
    "to repair: restore the damaged files of data/ from a copy of the cache; or delete the commits/UNIT.json of each "
    "damaged unit, and run the same capture again"
)
SHOWN = 10
"""Findings of a kind that a terminal shows."""

KINDS: dict[str, tuple[Severity, str]] = {
    "identity": ("damage", "cache.json or teacher.json is missing or invalid"),
    "unreadable": ("damage", "a file could not be read and was not checked"),
    "unit_list": ("damage", "the unit list is missing or invalid"),
    "manifest": ("damage", "the manifest is invalid or disagrees with the commits"),
    "commit": ("damage", "a commit is invalid, of a unit that is not in the unit list, or disagrees with its shard"),
    "missing": ("damage", "a committed shard does not exist"),
    "renamed": ("damage", "a committed shard exists under another name"),
    "swapped": ("damage", "a shard's file holds the shard of another unit"),
    "truncated": ("damage", "a shard is shorter than its commit records"),
    "sha256": ("damage", "a shard's sha256 differs from its commit's"),
    "page": ("damage", "a Parquet page fails its checksum or cannot be decoded"),
    "schema": ("damage", "a shard's columns are not those of the teacher's spec"),
    "foreign": ("damage", "a shard belongs to another cache, by its commit's fingerprint or by its sequence ids"),
    "rows": ("damage", "rows of a shard are missing, duplicated or in the wrong order"),
    "tokens": ("damage", "a row's tokens differ from the unit list's or do not match their digest"),
    "invariant": ("damage", "a row's signals cannot be decoded or violate an invariant of probabilities"),
    "reader_mismatch": ("damage", "fastparquet and pyarrow read different values"),
    "unfaithful": ("unfaithful", "the capture measured a larger distance to the live teacher than is allowed"),
    "faithfulness": ("damage", "faithfulness.json is invalid"),
    "lm_head": ("damage", "the LM head is missing, invalid or of another shape"),
    "tokenizer": ("damage", "the tokenizer's files do not match the digest in cache.json"),
    "quarantine": ("damage", "a quarantine entry is invalid"),
    "uncommitted": ("incomplete", "a unit is not captured"),
    "quarantined": ("incomplete", "the teacher could not process a sequence"),
    "no_manifest": ("incomplete", "the manifest is missing or older than the commits"),
    "not_compared": ("note", "the cache was not compared with the live teacher"),
    "unaudited": ("note", "an audit was requested and is not possible"),
    "unlisted": ("note", "a file that no commit names or that stillhouse does not write"),
    "not_cross_checked": ("note", "fastparquet is not installed"),
}
"""Every kind of finding with its severity and meaning, in the order of the report."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem and its place. Row groups and rows count from 0, rows through all row groups of the shard."""

    kind: str
    """A key of KINDS."""
    message: str
    shard: str | None = None
    """Path of the file, in `data/` or elsewhere in the store."""
    row_group: int | None = None
    row: int | None = None

    @property
    def severity(self) -> Severity:
        """The severity of the finding's kind."""
        return KINDS[self.kind][0]

    @property
    def is_shard_damage(self) -> bool:
        """Whether a shard is damaged, so that capturing its unit again repairs it."""
        in_data = (self.shard or "").startswith(f"{layout.DATA}/")
        return self.severity == "damage" and self.kind != "unreadable" and in_data

    def __str__(self) -> str:
        """Format as `damage page: data/x.parquet row group 0 row 3: message`."""
        parts = (("", self.shard), ("row group ", self.row_group), ("row ", self.row))
        place = " ".join(f"{name}{value}" for name, value in parts if value is not None)
        return f"{self.severity} {self.kind}: {place + ': ' if place else ''}{self.message}"


@dataclass(frozen=True, slots=True)
class Report:
    """The result of `verify`."""

    cache: str
    findings: tuple[Finding, ...]
    units: int
    """Units in the unit list."""
    shards: int
    """Shards read."""
    rows: int
    """Rows read, of shards whose row groups are all readable."""
    bytes: int
    """Bytes of the shards read."""
    cross_checked: bool
    """Whether fastparquet was compared with pyarrow."""
    verdict: Verdict | None = None
    """The capture's comparison with the live teacher, None where there was none."""
    audit: Audit | None = None

    @property
    def damaged(self) -> bool:
        """Whether any finding is damage."""
        return self._has("damage")

    @property
    def unfaithful(self) -> bool:
        """Whether the capture measured too large a distance to the live teacher."""
        return self._has("unfaithful")

    @property
    def complete(self) -> bool:
        """Whether every unit is captured without quarantined rows and the manifest is up to date."""
        return not self._has("incomplete")

    @property
    def exit_code(self) -> ExitCode:
        """FAILED for damage and unfaithfulness, else INCOMPLETE or DONE. Notes do not count."""
        if self.damaged or self.unfaithful:
            return ExitCode.FAILED
        return ExitCode.DONE if self.complete else ExitCode.INCOMPLETE

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        findings = [{"severity": finding.severity, **asdict(finding)} for finding in self.findings]
        counts = {"units": self.units, "shards": self.shards, "rows": self.rows, "bytes": self.bytes}
        state = {"damaged": self.damaged, "complete": self.complete, "cross_checked": self.cross_checked}
        audit = None if self.audit is None else asdict(self.audit)
        faithful = None if self.verdict is None else self.verdict.usable
        outcome = {"exit_code": int(self.exit_code), "faithful": faithful, "findings": findings, "audit": audit}
        return {"cache": self.cache, **state, **counts, **outcome}

    def __str__(self) -> str:
        """Format for a terminal: findings, outcome, what was checked, the audit."""
        parts = [*self._finding_lines(), self._outcome(), *self._scope_lines()]
        return "\n".join(parts if self.audit is None else [*parts, str(self.audit)])

    def _has(self, severity: Severity) -> bool:
        return any(finding.severity == severity for finding in self.findings)

    def _finding_lines(self) -> list[str]:
        """The first findings of each kind, and how to repair shards."""
        lines: list[str] = []
        for kind, (severity, _) in KINDS.items():
            of_kind = [finding for finding in self.findings if finding.kind == kind]
            lines += map(str, of_kind[:SHOWN])
            if len(of_kind) > SHOWN:
                lines.append(f"{severity} {kind}: {len(of_kind) - SHOWN} more like these; --json lists all")
        return [*lines, REPAIR] if any(finding.is_shard_damage for finding in self.findings) else lines

    def _outcome(self) -> str:
        if self.damaged:
            damages = sum(finding.severity == "damage" for finding in self.findings)
            return f"cache {self.cache} is DAMAGED: {damages} findings"
        state = "complete and undamaged" if self.complete else "undamaged but incomplete"
        return f"cache {self.cache} is {state}{', but not faithful to its teacher' if self.unfaithful else ''}"

    def _scope_lines(self) -> list[str]:
        size = f"{self.shards} of {self.units} shards, {self.rows} rows, {self.bytes / 1e6:.1f} MB"
        reader = "pyarrow and fastparquet" if self.cross_checked else "pyarrow alone"
        agree = ", which agree value for value" if self.cross_checked and not self.damaged else ""
        verdict = "not compared with the live teacher" if self.verdict is None else self.verdict.why
        return [
            f"  read      {size}, by {reader}{agree}",
            "  checked   sha256 of every file, page checksums, schema, rows against the unit list token for token,",
            "            log-probs finite and sorted, mass 1 with the tail, ids in the vocabulary, LM head, tokenizer",
            *wrap(verdict, 110, initial_indent="  faithful  ", subsequent_indent=" " * 12, break_on_hyphens=False),
        ]
