"""Compares nine kinds of training targets with the teacher's full distribution, on one student and one text.

    ce                the labels only
    renorm-12, -50    top-k entries, renormalised to sum to 1
    tail-50           top-k entries and one bucket for the tail
    label-50          top-k entries; the tail's mass is added to the label
    sampled-50        50 draws with replacement (RS-KD)
    unbiased-12, -50  threshold sampling with an exact head
    full              the full distribution, from the teacher's last states and its LM head

Each way trains the student of `--layers` from the same weights on the same tokens, with its own loss only, and is
measured on held-out documents against the teacher's exact distribution. `angle` and `norm` compare the gradient of each
way with that of `full` on the same tokens, over all trained weights, at the weights that `full` reached with the first
seed.

    python tests/benchmarks/bench_evidence.py --model NAME_OR_DIR --text FILE.jsonl [--tokens 8192] [--seeds 0 1]

prints the table and writes build/bench-evidence.json: one record for each way and seed, written as soon as it is
measured. The same command resumes an interrupted benchmark.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_evidence_text import score_text
from torch import Tensor

from pipeline.cache.format.schema import ShardSpec
from pipeline.config import DistributionSpec, LossWeights, Recipe, StudentSpec, TrainingSpec, recipe_from_dict
from pipeline.contracts import CaptureSpec, LmHead, ScoredSequence, TargetMode
from student.data.batch_sampler import BatchSampler
from student.data.collate import CollateSpec, MicroBatch, collate, from_bfloat16
from student.evaluation.measure import measure, pack_held_out
from student.head.chunked import HeadLoss, HeadSpec
from student.head.exact import TeacherHead, exact_head_loss
from student.loop.distiller import Coefficients, Distiller, LayerMap
from student.loop.optimizer import learning_rate_schedule, make_optimizer, set_learning_rate
from student.loop.step import take_step
from student.loop.worker_group import WorkerGroup
from student.model.build import Student, build_student, head_spec, prepare_for_training

ANGLE_SEQUENCES = 8
TOP12, TOP50 = CaptureSpec(k=12), CaptureSpec(k=50)
SAMPLED50 = CaptureSpec(mode=TargetMode.SAMPLED, k=50, draws=50)
UNBIASED12, UNBIASED50 = (CaptureSpec(mode=TargetMode.UNBIASED, k=k) for k in (12, 50))
CAPTURES = (TOP12, TOP50, SAMPLED50, UNBIASED12, UNBIASED50)


@dataclass(frozen=True, slots=True)
class Way:
    """Targets and loss of a training."""

    capture: CaptureSpec
    loss: str = "forward_kl"
    label: bool = False
    """Train with the label's cross-entropy only."""
    exact: bool = False
    """Train on the full distribution."""


WAYS = {
    "ce": Way(TOP12, label=True),
    "renorm-12": Way(TOP12, "renormalised_kl"),
    "renorm-50": Way(TOP50, "renormalised_kl"),
    "tail-50": Way(TOP50),
    "label-50": Way(TOP50, "label_residual_kl"),
    "sampled-50": Way(SAMPLED50),
    "unbiased-12": Way(UNBIASED12),
    "unbiased-50": Way(UNBIASED50),
    "full": Way(TOP12, exact=True),
}


class ExactDistiller(Distiller):
    """A distiller whose loss is the KL to the teacher's full distribution."""

    def __init__(
        self, student: Student, training: TrainingSpec, head: HeadSpec, teacher: TeacherHead, rows: int
    ) -> None:
        super().__init__(student, training, LayerMap(), head)
        self._teacher_head, self._rows = teacher, rows

    def _head_loss(self, hidden_TD: Tensor, batch: MicroBatch, coefficients: Coefficients) -> HeadLoss:
        weight_VD, bias_V = self.student.head()
        spec = replace(self._head, kd=coefficients.kd, ce=coefficients.ce)
        assert batch.hidden_TLE is not None
        state_TE = batch.hidden_TLE[:, 0].float()
        return exact_head_loss(
            hidden_TD, weight_VD, bias_V, state_TE, self._teacher_head, batch.targets, spec, self._rows
        )


@dataclass(frozen=True)
class Bench:
    """The scored text, and the recipe of the students."""

    recipe: Recipe
    shard: ShardSpec
    train: dict[CaptureSpec, list[ScoredSequence]]
    held_out: list[ScoredSequence]
    head: LmHead

    def distiller(self, way: Way, seed: int) -> Distiller:
        """Return a distiller with the student's initial weights."""
        training = self.training(way)
        spec = self.recipe.all_students[0].model_copy(update={"seed": seed})
        student = Student(build_student(spec, self.recipe, self.shard.vocabulary))
        prepare_for_training(student, training)
        head = head_spec(student.model.config)
        if not way.exact:
            return Distiller(student, training, LayerMap(), head)
        weight_VE = from_bfloat16(self.head.weight_VD).float()
        teacher = TeacherHead(weight_VE, None, self.head.scale, self.head.soft_cap)
        return ExactDistiller(student, training, head, teacher, training.chunk_rows)

    def training(self, way: Way) -> TrainingSpec:
        """Return the recipe's training settings with this way's loss."""
        return self.recipe.training.model_copy(update={"distribution": DistributionSpec(loss=way.loss)})

    def batch(self, way: Way, indexes: Sequence[int], number: int, seed: int) -> MicroBatch:
        """Pack some training sequences into a micro-batch."""
        shard = replace(self.shard, capture=replace(way.capture, hidden_layers=(-1,)))
        spec = CollateSpec({"teacher": shard}, entries=not (way.label or way.exact), hidden=way.exact)
        return collate([[self.train[way.capture][index]] for index in indexes], spec, number=number, seed=seed)


def main() -> None:
    """Train and measure what is not yet in the record, then print the table."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    record = Record(arguments.out, _settings(arguments))
    missing = [(name, seed) for seed in arguments.seeds for name in ("full", *WAYS) if not record.has(name, seed)]
    if missing:
        bench = _bench(arguments)
        for name, seed in dict.fromkeys(missing):
            _train_and_measure(bench, name, seed, record)
    print(table(record.rows))


def _train_and_measure(bench: Bench, name: str, seed: int, record: "Record") -> None:
    started_s, way = time.perf_counter(), WAYS[name]
    distiller = bench.distiller(way, seed)
    tokens = _train(bench, way, distiller, seed)
    measures = _measure(bench, distiller.student)
    if name == "full" and not record.angles:
        record.angles = _angles(bench, distiller)
    record.add({"way": name, "seed": seed, "tokens": tokens, **measures, "seconds": time.perf_counter() - started_s})


def _train(bench: Bench, way: Way, distiller: Distiller, seed: int) -> int:
    """Train on all tokens once; return their number."""
    training, lengths = bench.training(way), [len(row.sequence.input_ids_N) for row in bench.train[way.capture]]
    sampler = BatchSampler(
        lengths, [0] * len(lengths), seed=seed,
        tokens_per_step=training.tokens_per_step, tokens_per_batch=training.tokens_per_batch,
    )  # fmt: skip
    optimizer, rate_at = make_optimizer(distiller, training), learning_rate_schedule(training, len(sampler))
    coefficients = Coefficients(kd=0.0, ce=1.0) if way.label else Coefficients(kd=1.0, ce=0.0)
    tokens, started_s = 0, time.perf_counter()
    for number in range(len(sampler)):
        step = sampler[number]
        batches = [bench.batch(way, indexes, at, seed) for at, indexes in enumerate(step.micro_batches)]
        set_learning_rate(optimizer, rate_at(number))
        result = take_step(distiller, optimizer, step, batches, coefficients, training.clip_norm, WorkerGroup(), str)
        tokens += result.tokens
    seconds = time.perf_counter() - started_s
    print(f"{way.capture.mode} {way.loss}: {len(sampler)} steps, {seconds:.0f} s", file=sys.stderr, flush=True)
    return tokens


def _measure(bench: Bench, student: Student) -> dict[str, float]:
    batches = (pack_held_out([row], torch.device("cpu")) for row in bench.held_out)
    of_model, of_teacher = measure(batches, bench.head, student, head_spec(student.model.config))
    own = {f"teacher_{name}": value for name, value in asdict(of_teacher.compute()).items()}
    return {"loss_nats": of_model.nll_nats / of_model.labels, "teacher_nats": of_teacher.nll_nats / of_teacher.labels,
            **asdict(of_model.compute()), **own}  # fmt: skip


def _angles(bench: Bench, distiller: Distiller) -> dict[str, dict[str, float]]:
    """Return the angle in degrees and the ratio of norms between each way's gradient and that of `full`."""
    model, angles = distiller.student.model, {}
    gradients = ((name, _gradient(bench, WAYS[name], model)) for name in ("full", *WAYS))
    _, full = next(gradients)
    for name, gradient in gradients:
        cosine = torch.dot(gradient, full) / (gradient.norm() * full.norm())
        degrees = float(torch.rad2deg(torch.arccos(cosine.clamp(-1.0, 1.0))))
        angles[name] = {"degrees": degrees, "norm_ratio": float(gradient.norm() / full.norm())}
    return angles


def _gradient(bench: Bench, way: Way, model: Any) -> Tensor:
    distiller = bench.distiller(way, 0)
    distiller.student.model.load_state_dict(model.state_dict())
    coefficients = Coefficients(kd=0.0, ce=1.0) if way.label else Coefficients(kd=1.0, ce=0.0)
    for index in range(min(ANGLE_SEQUENCES, len(bench.train[way.capture]))):
        distiller(bench.batch(way, [index], 0, 0), coefficients)[0].backward()
    grads = [p.grad.flatten() for p in distiller.student.model.parameters() if p.grad is not None]
    return torch.cat(grads).double()


class Record:
    """The records in a file. A file with other settings is overwritten."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self._settings = path, settings
        stored = json.loads(path.read_text("utf-8")) if path.exists() else {}
        same = stored.get("settings") == settings
        self.rows: list[dict[str, Any]] = stored["records"] if same else []
        self.angles: dict[str, Any] = stored["angles"] if same else {}

    def has(self, name: str, seed: int) -> bool:
        """Return whether the way is measured with that seed."""
        return any((row["way"], row["seed"]) == (name, seed) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Add a record and write the file."""
        self.rows.append(row)
        self._write()

    def _write(self) -> None:
        for row in self.rows:
            row |= self.angles.get(row["way"], {})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        content = {"settings": self._settings, "angles": self.angles, "records": self.rows}
        self._path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the means over seeds, with the loss of each seed, as a Markdown table."""
    return "\n".join(_lines(rows))


def _lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    by_way = {name: [row for row in rows if row["way"] == name] for name in WAYS}
    mean = {name: _means(of_way) for name, of_way in by_way.items() if of_way}
    full = mean["full"]["loss_nats"]
    yield "| targets | loss, nats | above `full` | by seed | KL to teacher | top-1 | ECE % | angle | norm |"
    yield "|---|--:|--:|---|--:|--:|--:|--:|--:|"
    for name, values in mean.items():
        seeds = ", ".join(f"{row['loss_nats']:.3f}" for row in rows if row["way"] == name)
        yield (
            f"| {name} | {values['loss_nats']:.3f} | {values['loss_nats'] - full:+.3f} | {seeds} "
            f"| {values['kl_to_teacher']:.3f} "
            f"| {values['top1_agreement']:.3f} | {100 * values['calibration_error']:.1f} "
            f"| {values.get('degrees', float('nan')):.1f}° | {values.get('norm_ratio', float('nan')):.2f} |"
        )
    teacher = rows[0]
    error = 100 * teacher["teacher_calibration_error"]
    yield f"| the teacher | {teacher['teacher_nats']:.3f} | | | 0 | 1 | {error:.1f} | | |"


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    return {name: sum(row[name] for row in rows) / len(rows) for name in names}


def _bench(arguments: argparse.Namespace) -> Bench:
    text = score_text(arguments, CAPTURES)
    layers = [int(layer) for layer in arguments.layers.split(",")]
    recipe = recipe_from_dict({
        "name": "evidence", "storage": "build/evidence", "corpus": {"source": str(arguments.text)},
        "teachers": [{"name": "teacher", "model": arguments.model}],
        "student": StudentSpec(from_teacher="teacher", layers=tuple(layers)).model_dump(),
        "training": TrainingSpec(
            tokens_per_step=arguments.tokens_per_step, tokens_per_batch=arguments.tokens_per_step,
            learning_rate=arguments.learning_rate, freeze=("model.embed_tokens",), losses=LossWeights(),
        ).model_dump(),
    })  # fmt: skip
    order = list(range(len(text.train[CAPTURES[0]])))
    random.Random(0).shuffle(order)
    train = {capture: [rows[index] for index in order] for capture, rows in text.train.items()}
    return Bench(recipe, text.shard, train, text.held_out, text.head)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    without_effect = {"out", "seeds", "threads"}
    return {name: str(value) for name, value in vars(arguments).items() if name not in without_effect}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="JSON lines with a `text` each")
    parser.add_argument("--tokens", type=int, default=8192, help="number of training tokens")
    parser.add_argument("--held-out-tokens", type=int, default=3072)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--tokens-per-step", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--layers", default="0,1,2,3,4,5,6,7,8,9,10,11,20,21,22,23,24,25,26,27,28,29")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("build/bench-evidence.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
