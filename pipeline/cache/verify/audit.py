"""What the kept entries lose, measured on the audit slice, where the exact distribution is kept too.

The exact distribution is the LM head on the state that it read. Two questions are answered:

- Is what is stored true? Label log-probs, entropies and entries against the exact distribution.
- What would a student learn from it? The gradient of the stored target against the gradient of the full one, at two
  synthetic students (the teacher with noise on its states): the angle and the ratio of norms of the gradient of a
  D x D matrix below the head, over all positions, and the mean angle of the positions' own gradients. Beside the
  stored target stand those that the other modes would have kept with as many entries.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from pipeline.bfloat16 import to_float32
from pipeline.cache.format.schema import ShardSpec
from pipeline.cache.reader import CacheReader
from pipeline.cache.verify.audit_targets import (
    WITH_TAIL,
    Head,
    Target,
    bucket_kl,
    log_softmax,
    state_gradient,
    what_if,
)
from pipeline.contracts import FloatArray, ScoredSequence
from pipeline.errors import AdmissionError

MAX_POSITIONS = 512
CHUNK_POSITIONS = 64
MAX_LABEL_ERROR = 0.25
"""Nats, mean: an engine's bfloat16 and the codec together stay under half of it. Admission refuses more."""
MAX_KL = 0.05
"""Nats, mean, of the exact distribution to the kept one over entries and tail. Admission refuses more."""
TURNS = (0.16, 0.4)
"""How far the synthetic students' states lie from the teacher's, as a share of their size: a near and a far student."""

LEGEND = f"""\
  stored   what this cache keeps; the others are what each mode would have kept with as many entries or draws at most
  mass     the teacher's probability that the entries hold
  KL       nats from the exact distribution to the stored one, the tail as one (best: 0; training refuses over {MAX_KL})
           - where weights are no probabilities by design: renormalised ones are all too large, and drawn ones are
           right on average over draws, not in one row
  angle    between the gradients that a student gets from the target and from the full distribution (best: 0°),
           of all positions together, and by position: the mean of each position's own
  norm     of the one gradient as a share of the other's (best: 1)"""


@dataclass(frozen=True, slots=True)
class Lesson:
    """How a target's gradient compares with the full distribution's, at one student."""

    angle_deg: float
    norm_ratio: float
    position_angle_deg: float


@dataclass(frozen=True, slots=True)
class TargetAudit:
    """One target against the exact distribution."""

    name: str
    entries: float
    """Mean number of entries a position."""
    mass: float
    """Mean exact probability of the entries."""
    kl: float | None
    """Mean KL over entries and bucket, nats; None where weights are no probabilities by design."""
    lessons: tuple[Lesson, ...]
    """One for each student."""


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit measured."""

    positions: int
    label_error: float
    """Mean absolute difference of stored and exact label log-prob, nats."""
    entropy_error: float
    """Mean absolute difference of stored and exact entropy, nats."""
    student_kl: tuple[float, ...]
    """Mean KL of the exact distribution to each synthetic student, nats."""
    targets: tuple[TargetAudit, ...]
    """The stored one first."""

    def as_json(self) -> dict[str, Any]:
        """The audit as JSON holds it."""
        return asdict(self)

    def __str__(self) -> str:
        students = "".join(f" | {f'a student {kl:.2f} nats away':>26}" for kl in self.student_kl)
        columns = f" | {'angle':>7}{'norm':>7}{'by position':>12}" * len(self.student_kl)
        lines = [
            f"audit: what the entries lose against the exact distribution, at {self.positions} positions",
            f"  the stored label log-prob is off by {self.label_error:.4f} nats (training refuses over "
            f"{MAX_LABEL_ERROR}), the entropy by {self.entropy_error:.4f}, mean absolute",
            f"  {'':<43}{students}",
            f"  {'target':<18}{'entries':>8}{'mass':>7}{'KL':>10}{columns}",
        ]
        return "\n".join([*lines, *map(_line, self.targets), LEGEND])


def audit_cache(reader: CacheReader, *, max_positions: int = MAX_POSITIONS) -> Audit:
    """Measure on up to `max_positions` of the audited sequences, held-out ones first.

    Raises AdmissionError where the cache keeps no LM head or no audited sequence, DamageError where it is damaged.
    """
    stored_head = reader.lm_head()
    if stored_head is None:
        raise AdmissionError(f"cache {reader.store.uri}: keeps no LM head, so nothing can be audited")
    sums = _AuditAccumulator(Head(stored_head), reader.spec)
    for row, rows_T in _slices(reader, max_positions):
        sums.add(row, rows_T)
    if not sums.positions:
        raise AdmissionError(f"cache {reader.store.uri}: has no audited sequence; set capture.audit above 0")
    return sums.audit()


def _slices(reader: CacheReader, max_positions: int) -> Iterator[tuple[ScoredSequence, slice]]:
    left = max_positions
    for split in ("held_out", "train"):
        for row in reader.rows(split):
            exact = row.signals.exact_hidden_TD
            for start in range(0, 0 if exact is None else len(exact), CHUNK_POSITIONS):
                if left <= 0:
                    return
                stop = min(start + CHUNK_POSITIONS, len(row.signals.label_logprob_T), start + left)
                left -= stop - start
                yield row, slice(start, stop)


@dataclass
class _Gradients:
    """Running sums of one target's lessons at one student."""

    total_DD: Any = 0.0
    angles_deg: float = 0.0


@dataclass
class _AuditAccumulator:
    """Everything that is added up while positions are looked at, a chunk at a time."""

    head: Head
    spec: ShardSpec
    positions: int = 0
    label_error: float = 0.0
    entropy_error: float = 0.0
    student_kl: list[float] = field(default_factory=lambda: [0.0 for _ in TURNS])
    full: list[_Gradients] = field(default_factory=lambda: [_Gradients() for _ in TURNS])
    kept: dict[str, list[_Gradients]] = field(default_factory=dict)
    counts: dict[str, list[float]] = field(default_factory=dict)
    """By target: entries, mass, KL."""
    turn_DD: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        """A random matrix that keeps sizes: a student's error is a rule, not noise, and so adds up over positions."""
        width = self.head.weight_VD.shape[1]
        random_DD = np.random.default_rng(0).standard_normal((width, width), np.float32)
        self.turn_DD = random_DD / np.float32(np.sqrt(width))

    def add(self, row: ScoredSequence, rows_T: slice) -> None:
        signals, labels_T = row.signals, row.sequence.input_ids_N[1:][rows_T]
        if signals.exact_hidden_TD is None:
            return
        generator = np.random.default_rng(self.positions)
        state_TD = to_float32(signals.exact_hidden_TD[rows_T])
        log_TV = log_softmax(self.head.logits(state_TD))
        p_TV = np.exp(log_TV)
        exact_label_T = np.take_along_axis(log_TV, labels_T[:, None].astype(np.int64), axis=1)[:, 0]
        self.label_error += float(np.abs(exact_label_T - signals.label_logprob_T[rows_T]).sum())
        self.entropy_error += float(np.abs(-(p_TV * log_TV).sum(axis=1) - signals.entropy_T[rows_T]).sum())
        targets = [self._stored(row, rows_T), *what_if(p_TV, self.spec.capture, generator)]
        for target in targets:
            self._count(target, p_TV)
        turned_TD = state_TD @ self.turn_DD
        for student, turn in enumerate(TURNS):
            self._teach(student, state_TD + np.float32(turn) * turned_TD, log_TV, p_TV, targets)
        self.positions += len(state_TD)

    def audit(self) -> Audit:
        n = self.positions
        return Audit(
            positions=n,
            label_error=self.label_error / n,
            entropy_error=self.entropy_error / n,
            student_kl=tuple(total / n for total in self.student_kl),
            targets=tuple(self._target(name) for name in self.counts),
        )

    def _stored(self, row: ScoredSequence, rows_T: slice) -> Target:
        signals = row.signals
        return Target(
            f"stored {self.spec.capture.mode}",
            signals.entry_id_TK[rows_T].astype(np.int64),
            np.exp(signals.entry_logweight_TK[rows_T]),
            np.exp(signals.tail_logmass_T[rows_T]),
        )

    def _count(self, target: Target, p_TV: FloatArray) -> None:
        sums = self.counts.setdefault(target.name, [0.0, 0.0, 0.0])
        kept_TK = target.weight_TK > 0
        mass = np.where(kept_TK, np.take_along_axis(p_TV, target.entry_id_TK, axis=1), 0.0).sum()
        for number, value in enumerate((kept_TK.sum(), mass, bucket_kl(target, p_TV).sum())):
            sums[number] += float(value)

    def _teach(
        self, student: int, state_TD: FloatArray, log_TV: FloatArray, p_TV: FloatArray, targets: list[Target]
    ) -> None:
        """Add every target's gradients at a student whose states these are."""
        logits_TV = self.head.logits(state_TD)
        slope_TV = self.head.slope(logits_TV)
        log_q_TV = log_softmax(logits_TV)
        q_TV = np.exp(log_q_TV)
        self.student_kl[student] += float((p_TV * (log_TV - log_q_TV)).sum())
        q_state_TD = (q_TV if slope_TV is None else q_TV * slope_TV) @ self.head.weight_VD
        p_state_TD = (p_TV if slope_TV is None else p_TV * slope_TV) @ self.head.weight_VD
        full_TD = q_state_TD - p_state_TD
        self.full[student].total_DD += full_TD.T @ state_TD
        for target in targets:
            kept_TD = state_gradient(target, q_TV, q_state_TD, self.head, slope_TV)
            sums = self.kept.setdefault(target.name, [_Gradients() for _ in TURNS])[student]
            sums.total_DD += kept_TD.T @ state_TD
            sums.angles_deg += float(_angles_deg(kept_TD, full_TD).sum())

    def _target(self, name: str) -> TargetAudit:
        entries, mass, kl = (value / self.positions for value in self.counts[name])
        keeps_probabilities = name in WITH_TAIL or (name.startswith("stored") and self.spec.has_tail)
        lessons = (self._lesson(kept, full) for kept, full in zip(self.kept[name], self.full, strict=True))
        return TargetAudit(name, entries, mass, kl if keeps_probabilities else None, tuple(lessons))

    def _lesson(self, kept: _Gradients, full: _Gradients) -> Lesson:
        kept_1D, full_1D = kept.total_DD.reshape(1, -1), full.total_DD.reshape(1, -1)
        return Lesson(
            angle_deg=float(_angles_deg(kept_1D, full_1D)[0]),
            norm_ratio=float(np.linalg.norm(kept_1D) / np.linalg.norm(full_1D)),
            position_angle_deg=kept.angles_deg / self.positions,
        )


def _angles_deg(a_TD: FloatArray, b_TD: FloatArray) -> FloatArray:
    """Angle between rows, degrees, [T]."""
    a_TD, b_TD = a_TD.astype(np.float64), b_TD.astype(np.float64)
    norms_T = np.linalg.norm(a_TD, axis=1) * np.linalg.norm(b_TD, axis=1)
    cosine_T = (a_TD * b_TD).sum(axis=1) / np.maximum(norms_T, 1e-300)
    angle_T: FloatArray = np.degrees(np.arccos(np.clip(cosine_T, -1.0, 1.0)))
    return angle_T


def _line(target: TargetAudit) -> str:
    kl = "-" if target.kl is None else f"{max(target.kl, 0.0):.2g}"
    lessons = "".join(
        f" | {lesson.angle_deg:>6.2f}°{lesson.norm_ratio:>7.3f}{lesson.position_angle_deg:>11.1f}°"
        for lesson in target.lessons
    )
    return f"  {target.name:<18}{target.entries:>8.1f}{target.mass:>7.3f}{kl:>10}{lessons}"
