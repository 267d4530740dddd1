"""`stillhouse inspect`: an overview of a cache, or one sequence with the teacher's signals by position."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from pipeline.cache.faithfulness import read_verdict
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage.store import Store
from pipeline.contracts import ScoredSequence, Split, TargetMode
from pipeline.errors import UsageError
from pipeline.models.tokenizers import Tokenizer, load_tokenizer

SHOWN_ENTRIES = 5
SHOWN_SEQUENCES = 12
_LEGEND = """\
Each position is the teacher's prediction given the text so far. label: the next token, spaces as ·; p(label): its
probability; entropy: of the full distribution, in nats; kept: number of entries in the cache; """
LEGEND = f"""{_LEGEND}mass: their total
probability; then the most likely entries, each with its probability."""
LEGEND_OF_SAMPLES = f"""{_LEGEND}weight: their total
weight, unbiased over samples; then the entries of largest weight, each with its weight."""
_PARTS = {
    "entry_": "entries",
    "common_id_": "entries",
    "hidden_": "hidden states",
    "exact_hidden": "exact distributions of the audit",
}
_SPLITS: tuple[Split, ...] = ("train", "held_out")
_ONLY_OF = {"top_p": "topp", "min_k": "topp", "draws": "sampled"}
"""Capture settings that apply to one mode only."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One kept entry."""

    token: str
    token_id: int
    weight: float
    """The teacher's probability in `topk` and `topp`, a sampling weight in the other modes."""


@dataclass(frozen=True, slots=True)
class Position:
    """The teacher's prediction of one token."""

    position: int
    label: str
    label_id: int
    label_probability: float
    entropy: float
    """Nats."""
    captured_mass: float
    """Total weight of the entries."""
    kept_entries: int
    entries: tuple[Entry, ...]
    """The first `entries` of them."""


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One sequence with its signals, for a terminal or as JSON."""

    sequence_id: str
    unit_id: str
    document_id: str
    domain: str | None
    n_tokens: int
    text: str
    bits_per_token: float
    """The teacher's mean cross-entropy of all next tokens."""
    mode: TargetMode
    """Defines the meaning of the entries' weights."""
    positions: tuple[Position, ...]

    def __str__(self) -> str:
        sampled = self.mode in (TargetMode.UNBIASED, TargetMode.SAMPLED)
        legend, share, best = (LEGEND_OF_SAMPLES, "weight", "heaviest") if sampled else (LEGEND, "mass", "likeliest")
        head = (
            f"sequence {self.sequence_id} (document {self.document_id}, domain {self.domain}, unit {self.unit_id})\n"
            f"{self.n_tokens} tokens; teacher's cross-entropy {self.bits_per_token:.2f} bits per token\n\n"
            f"{self.text}\n\n{legend}\n\n"
            f"{'at':>5} {'label':<16} {'p(label)':>9} {'entropy':>8} {'kept':>5} {share:>6}  {best} entries"
        )
        left = self.n_tokens - 1 - len(self.positions)
        more = [f"... {left} more positions: --rows N shows more"] if left > 0 else []
        return "\n".join([head, *(_position_line(position) for position in self.positions), *more])


@dataclass(frozen=True, slots=True)
class Overview:
    """Summary of a cache."""

    cache: str
    fingerprint: str
    teacher: dict[str, Any]
    capture: dict[str, Any]
    units: dict[Split, str]
    """`committed of all`, by split."""
    rows: int
    tokens: int
    bytes: int
    bytes_per_token: dict[str, float]
    """Of the first shard, by group of columns."""
    quarantined: int
    faithful: bool | None
    """Result of the capture's comparison with the live teacher; None where there was none."""
    faithfulness: str
    """Its explanation."""
    sequences: tuple[str, ...]
    """The first ids, for --sequence."""

    def __str__(self) -> str:
        teacher, capture = self.teacher, self.capture
        model = f"{teacher['architecture']}, {teacher['layers']} layers, V={teacher['vocabulary']}"
        used = {key: value for key, value in capture.items() if _ONLY_OF.get(key, capture["mode"]) == capture["mode"]}
        kept = ", ".join(f"{key}={value}" for key, value in used.items() if value not in (None, (), False))
        units = ", ".join(f"{split} {count}" for split, count in self.units.items())
        per_token = self.bytes / max(1, self.tokens)
        parts = ", ".join(f"{part} {size:.1f}" for part, size in self.bytes_per_token.items() if size > 0.05)
        verdict = {True: "yes: ", False: "NO: ", None: ""}[self.faithful] + self.faithfulness
        return "\n".join(
            [
                f"cache       {self.cache}",
                f"fingerprint {self.fingerprint}",
                f"teacher     {teacher['name']}: {model}, {teacher['dtype']}, {teacher['engine']} "
                f"{teacher['engine_version']}",
                f"capture     {kept}",
                f"units       {units} (committed of all); {self.quarantined} rows quarantined",
                f"size        {self.rows} rows, {self.tokens} tokens, {self.bytes / 1e6:.2f} MB, "
                f"{per_token:.0f} bytes per token",
                f"            in the first shard: {parts}",
                *wrap(f"faithful    {verdict}", 110, subsequent_indent=" " * 12, break_on_hyphens=False),
                f"sequences   the first ones; stillhouse inspect {self.cache} --sequence ID shows one by position",
                *(f"  {name}" for name in self.sequences),
            ]
        )


def inspect_cache(
    uri: str | Path | Store, sequence_id: str | None = None, *, rows: int = 32, entries: int = SHOWN_ENTRIES
) -> Overview | SequenceView:
    """Return an overview, or with an id that sequence's first `rows` positions with up to `entries` entries each.

    Raises StorageError (no cache), DamageError, and UsageError (no such sequence, rows or entries below 1).
    """
    for name, value in (("rows", rows), ("entries", entries)):
        if value < 1:
            raise UsageError(f"{name}: expected at least 1, got {value}")
    reader = CacheReader.open(uri)
    if sequence_id is None:
        return _overview(reader)
    unit_id, row = _find(reader, sequence_id)
    tokenizer = load_tokenizer(reader.tokenizer_dir())
    sequence = row.sequence
    return SequenceView(
        sequence_id=sequence.sequence_id,
        unit_id=unit_id,
        document_id=sequence.document_id,
        domain=sequence.domain,
        n_tokens=len(sequence.input_ids_N),
        text=tokenizer.decode(sequence.input_ids_N),
        bits_per_token=float(-row.signals.label_logprob_T.mean() / np.log(2)),
        mode=reader.spec.capture.mode,
        positions=tuple(_positions(row, tokenizer, rows, entries)),
    )


def _positions(row: ScoredSequence, tokenizer: Tokenizer, rows: int, entries: int) -> Iterator[Position]:
    signals, label_T = row.signals, row.sequence.input_ids_N[1:]
    for position in range(min(rows, len(label_T))):
        weight_K = np.exp(signals.entry_logweight_TK[position].astype(np.float64))
        shown = zip(signals.entry_id_TK[position].tolist(), weight_K.tolist(), strict=True)
        yield Position(
            position=position,
            label=tokenizer.token_text(int(label_T[position])),
            label_id=int(label_T[position]),
            label_probability=float(np.exp(signals.label_logprob_T[position])),
            entropy=float(signals.entropy_T[position]),
            captured_mass=float(weight_K.sum()),
            kept_entries=int((weight_K > 0).sum()),
            entries=tuple(
                Entry(tokenizer.token_text(token_id), token_id, weight)
                for token_id, weight in list(shown)[:entries]
                if weight > 0
            ),
        )


def _overview(reader: CacheReader) -> Overview:
    units = {split: f"{len(reader.unit_ids(split))} of {len(reader.units.unit_ids(split))}" for split in _SPLITS}
    verdict = read_verdict(reader.store)
    return Overview(
        cache=reader.store.uri,
        fingerprint=reader.identity.fingerprint,
        teacher=asdict(reader.description),
        capture=asdict(reader.spec.capture),
        units=units,
        rows=reader.manifest.rows,
        tokens=reader.manifest.tokens,
        bytes=reader.manifest.bytes,
        bytes_per_token=_bytes_per_token(reader),
        quarantined=len(reader.manifest.quarantined),
        faithful=None if verdict is None else verdict.usable,
        faithfulness="not compared with the live teacher" if verdict is None else verdict.why,
        sequences=tuple(_first_ids(reader)),
    )


def _bytes_per_token(reader: CacheReader) -> dict[str, float]:
    sizes: dict[str, float] = {}
    for unit_id in reader.unit_ids()[:1]:
        tokens = max(1, reader.commit(unit_id).tokens)
        for column, size in reader.shard(unit_id).column_bytes().items():
            part = next((part for prefix, part in _PARTS.items() if column.startswith(prefix)), "tokens and scalars")
            sizes[part] = sizes.get(part, 0.0) + size / tokens
    return dict(sorted(sizes.items(), key=lambda part: -part[1]))


def _first_ids(reader: CacheReader) -> Iterator[str]:
    for split in _SPLITS:
        unit_ids = reader.unit_ids(split)
        if unit_ids:
            yield from reader.shard(unit_ids[0]).sequence_ids()[: SHOWN_SEQUENCES // len(_SPLITS)]


def _find(reader: CacheReader, sequence_id: str) -> tuple[str, ScoredSequence]:
    if sequence_id in reader.manifest.quarantined:
        where = reader.store.uri
        raise UsageError(f"sequence {sequence_id}: quarantined, it has no row; run: stillhouse verify {where}")
    for unit_id in reader.unit_ids():
        shard = reader.shard(unit_id)
        if sequence_id in shard.sequence_ids():
            return unit_id, next(row for row in reader.read_unit(unit_id) if row.sequence.sequence_id == sequence_id)
    raise UsageError(f"sequence {sequence_id}: not in cache {reader.store.uri}; stillhouse inspect lists the first ids")


def _position_line(position: Position) -> str:
    entries = "  ".join(f"{_visible(entry.token)} {entry.weight:.2g}" for entry in position.entries)
    return (
        f"{position.position:>5} {_visible(position.label):<16} {position.label_probability:>9.2g} "
        f"{position.entropy:>8.3f} {position.kept_entries:>5} {position.captured_mass:>6.3f}  {entries}"
    )


def _visible(token: str) -> str:
    """Show spaces as · and escape unprintable characters."""
    return "".join("·" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in token)
