"""`verify --audit`: the error of the kept entries, measured where the cache also keeps the exact distribution.

The exact distribution is the LM head applied to the stored final state. Measured are

- the stored label log-probs, entropies and entries against the exact ones;
- the gradient of the stored target against that of the full distribution, at two simulated students (the teacher with
  linearly perturbed states): cosine angle and norm ratio of the gradient of a D x D matrix in front of the LM head,
  summed over all positions, and the mean angle of the single positions' gradients. For comparison, the same is measured
  for the targets that the other modes would have kept with as many entries.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
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
    simulated_targets,
    state_gradient,
)
from pipeline.contracts import FloatArray, ScoredSequence
from pipeline.errors import AdmissionError

MAX_POSITIONS = 512
CHUNK_POSITIONS = 64
MAX_LABEL_ERROR = 0.25
"""Nats, mean, above which admission refuses a cache. bfloat16 engines and the codec together stay below half of it."""
MAX_KL = 0.05
"""Nats, mean KL of the exact distribution to entries and tail, above which admission refuses a cache."""
PERTURBATIONS = (0.16, 0.4)
"""Norm of each simulated student's state error, as a share of the teacher's state: a near and a far student."""

LEGEND = f"""\
  stored   the target in this cache; below it, what each mode would have kept with at most as many entries or draws
  mass     the teacher's probability of the entries
  KL       nats from the exact distribution to the stored one, with one bucket for the tail (best: 0; training refuses
           more than {MAX_KL}). - where weights are no probabilities by design: renormalised ones are too large, and
           sampled ones are right on average over draws, not in one row
  angle    between the student's gradients from this target and from the full distribution (best: 0°), summed over
           all positions; `by position` is the mean over single positions
  norm     norm of the first gradient divided by the second's (best: 1)"""


@dataclass(frozen=True, slots=True)
class GradientError:
    """A target's gradient compared with the full distribution's, at one simulated student."""

    angle_deg: float
    """Between the gradients summed over positions."""
    norm_ratio: float
    """Of the gradients summed over positions."""
    position_angle_deg: float
    """Mean over positions of the angle between single positions' gradients."""


@dataclass(frozen=True, slots=True)
class TargetAudit:
    """One target compared with the exact distribution."""

    name: str
    entries: float
    """Mean number of entries per position."""
    mass: float
    """Mean exact probability of the entries."""
    kl: float | None
    """Mean KL over entries and tail bucket, nats; None where weights are no probabilities by design."""
    gradients: tuple[GradientError, ...]
    """One per simulated student."""


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of an audit."""

    positions: int
    label_error: float
    """Mean absolute error of the stored label log-probs, nats."""
    entropy_error: float
    """Mean absolute error of the stored entropies, nats."""
    student_kl: tuple[float, ...]
    """Mean KL of the exact distribution to each simulated student, nats."""
    targets: tuple[TargetAudit, ...]
    """The stored one first."""

    def __str__(self) -> str:
        students = "".join(f" | {f'student at {kl:.2f} nats':>26}" for kl in self.student_kl)
        columns = f" | {'angle':>7}{'norm':>7}{'by position':>12}" * len(self.student_kl)
        lines = [
            f"audit: error of the kept entries against the exact distribution, at {self.positions} positions",
            f"  mean absolute error: label log-prob {self.label_error:.4f} nats (training refuses more than "
            f"{MAX_LABEL_ERROR}), entropy {self.entropy_error:.4f} nats",
            f"  {'':<43}{students}",
            f"  {'target':<18}{'entries':>8}{'mass':>7}{'KL':>10}{columns}",
        ]
        return "\n".join([*lines, *map(_table_line, self.targets), LEGEND])


def audit_cache(reader: CacheReader, *, max_positions: int = MAX_POSITIONS) -> Audit:
    """Audit up to `max_positions` positions of the audited sequences, held-out ones first.

    Raises AdmissionError where the cache has no LM head or no audited sequence, DamageError where it is damaged.
    """
    stored_head = reader.lm_head()
    if stored_head is None:
        raise AdmissionError(f"cache {reader.store.uri}: cannot be audited, its teacher's engine exports no LM head")
    sums = _AuditSums(Head(stored_head), reader.spec)
    for row, rows in _chunks(reader, max_positions):
        sums.add(row, rows)
    if not sums.positions:
        raise AdmissionError(f"cache {reader.store.uri}: has no audited sequence; set capture.audit above 0")
    return sums.audit()


def _chunks(reader: CacheReader, max_positions: int) -> Iterator[tuple[ScoredSequence, slice]]:
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
class _GradientSums:
    """Sums over positions for one target and student: the gradient of the D x D matrix, and angles."""

    matrix_DD: Any = 0.0
    angles_deg: float = 0.0


@dataclass
class _AuditSums:
    """Sums over all positions, added a chunk of R positions at a time."""

    head: Head
    spec: ShardSpec
    positions: int = 0
    label_error: float = 0.0
    entropy_error: float = 0.0
    student_kl: list[float] = field(default_factory=lambda: [0.0 for _ in PERTURBATIONS])
    full: list[_GradientSums] = field(default_factory=lambda: [_GradientSums() for _ in PERTURBATIONS])
    kept: dict[str, list[_GradientSums]] = field(default_factory=dict)
    """By target."""
    counts: dict[str, list[float]] = field(default_factory=dict)
    """By target: entries, mass, KL."""
    perturbation_DD: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        """Draw a random matrix of unit gain: the students' error is linear, so that it adds up over positions."""
        width = self.head.weight_VD.shape[1]
        random_DD = np.random.default_rng(0).standard_normal((width, width), np.float32)
        self.perturbation_DD = random_DD / np.float32(np.sqrt(width))

    def add(self, row: ScoredSequence, rows: slice) -> None:
        signals, label_R = row.signals, row.sequence.input_ids_N[1:][rows]
        if signals.exact_hidden_TD is None:
            return
        generator = np.random.default_rng(self.positions)
        state_RD = to_float32(signals.exact_hidden_TD[rows])
        logprob_RV = log_softmax(self.head.logits(state_RD))
        p_RV = np.exp(logprob_RV)
        exact_label_R = np.take_along_axis(logprob_RV, label_R[:, None].astype(np.int64), axis=1)[:, 0]
        self.label_error += float(np.abs(exact_label_R - signals.label_logprob_T[rows]).sum())
        self.entropy_error += float(np.abs(-(p_RV * logprob_RV).sum(axis=1) - signals.entropy_T[rows]).sum())
        entry_id_RK, weight_RK = signals.entry_id_TK[rows].astype(np.int64), np.exp(signals.entry_logweight_TK[rows])
        tail_R = np.exp(signals.tail_logmass_T[rows])
        stored = Target(f"stored {self.spec.capture.mode}", entry_id_RK, weight_RK, tail_R)
        targets = [stored, *simulated_targets(p_RV, self.spec.capture, generator)]
        for target in targets:
            self._add_counts(target, p_RV)
        error_RD = state_RD @ self.perturbation_DD
        for student, size in enumerate(PERTURBATIONS):
            self._add_gradients(student, state_RD + np.float32(size) * error_RD, logprob_RV, p_RV, targets)
        self.positions += len(state_RD)

    def audit(self) -> Audit:
        n = self.positions
        return Audit(
            positions=n,
            label_error=self.label_error / n,
            entropy_error=self.entropy_error / n,
            student_kl=tuple(total / n for total in self.student_kl),
            targets=tuple(self._target_audit(name) for name in self.counts),
        )

    def _add_counts(self, target: Target, p_RV: FloatArray) -> None:
        sums = self.counts.setdefault(target.name, [0.0, 0.0, 0.0])
        kept_RK = target.weight_RK > 0
        mass = np.where(kept_RK, np.take_along_axis(p_RV, target.entry_id_RK, axis=1), 0.0).sum()
        for number, value in enumerate((kept_RK.sum(), mass, bucket_kl(target, p_RV).sum())):
            sums[number] += float(value)

    def _add_gradients(
        self, student: int, state_RD: FloatArray, logprob_RV: FloatArray, p_RV: FloatArray, targets: list[Target]
    ) -> None:
        """Add the gradients of every target at the simulated student with these states."""
        logits_RV = self.head.logits(state_RD)
        slope_RV = self.head.slope(logits_RV)
        student_logprob_RV = log_softmax(logits_RV)
        q_RV = np.exp(student_logprob_RV)
        self.student_kl[student] += float((p_RV * (logprob_RV - student_logprob_RV)).sum())
        q_state_RD = (q_RV if slope_RV is None else q_RV * slope_RV) @ self.head.weight_VD
        p_state_RD = (p_RV if slope_RV is None else p_RV * slope_RV) @ self.head.weight_VD
        full_RD = q_state_RD - p_state_RD
        self.full[student].matrix_DD += full_RD.T @ state_RD
        for target in targets:
            kept_RD = state_gradient(target, q_RV, q_state_RD, self.head, slope_RV)
            sums = self.kept.setdefault(target.name, [_GradientSums() for _ in PERTURBATIONS])[student]
            sums.matrix_DD += kept_RD.T @ state_RD
            sums.angles_deg += float(_angle_deg(kept_RD, full_RD).sum())

    def _target_audit(self, name: str) -> TargetAudit:
        entries, mass, kl = (value / self.positions for value in self.counts[name])
        keeps_probabilities = name in WITH_TAIL or (name.startswith("stored") and self.spec.has_tail)
        gradients = (self._gradient_error(kept, full) for kept, full in zip(self.kept[name], self.full, strict=True))
        return TargetAudit(name, entries, mass, kl if keeps_probabilities else None, tuple(gradients))

    def _gradient_error(self, kept: _GradientSums, full: _GradientSums) -> GradientError:
        return GradientError(
            angle_deg=float(_angle_deg(kept.matrix_DD.ravel(), full.matrix_DD.ravel())),
            norm_ratio=float(np.linalg.norm(kept.matrix_DD) / np.linalg.norm(full.matrix_DD)),
            position_angle_deg=kept.angles_deg / self.positions,
        )


def _angle_deg(a: FloatArray, b: FloatArray) -> FloatArray:
    """Compute the cosine angle between vectors along the last axis, in degrees."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = (a * b).sum(axis=-1) / np.maximum(norms, 1e-300)
    angle: FloatArray = np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0)))
    return angle


def _table_line(target: TargetAudit) -> str:
    kl = "-" if target.kl is None else f"{max(target.kl, 0.0):.2g}"
    gradients = "".join(
        f" | {error.angle_deg:>6.2f}°{error.norm_ratio:>7.3f}{error.position_angle_deg:>11.1f}°"
        for error in target.gradients
    )
    return f"  {target.name:<18}{target.entries:>8.1f}{target.mass:>7.3f}{kl:>10}{gradients}"
