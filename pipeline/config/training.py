"""Recipe sections of the training: students, losses, optimizer, evaluation."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from pipeline.config.base import Fraction, Name, Section


class StudentSpec(Section):
    """One student. Exactly one of `from_teacher`, `checkpoint` and `config` selects its initial weights."""

    name: Name = "student"
    from_teacher: Name | None = None
    """Prune this teacher: copy some of its layers from its checkpoint, tensor by tensor."""
    layers: int | tuple[int, ...] | None = None
    """With `from_teacher`: number of layers to keep (evenly spaced), or the list of them."""
    checkpoint: str | None = None
    """Start from this model: a shipped model's name, a local folder, or a hub id with `revision`."""
    revision: str | None = None
    """Commit of a hub id: 40 hex digits."""
    config: dict[str, Any] | None = None
    """Start from random weights for this transformers config (`model_type` and its sizes)."""
    seed: int | None = None
    """Overrides the recipe's seed for this student."""

    @model_validator(mode="after")
    def _check(self) -> "StudentSpec":
        starts = [self.from_teacher, self.checkpoint, self.config]
        if sum(start is not None for start in starts) != 1:
            raise ValueError("expected exactly one of from_teacher, checkpoint and config")
        if (self.layers is None) != (self.from_teacher is None):
            raise ValueError("layers: expected with from_teacher, and only there")
        return self


def layers_after_gaps(kept: Sequence[int]) -> dict[int, int]:
    """Map the student's index of each layer that follows a gap in `kept` to its index in the teacher.

    `kept`: the teacher's layers that the student keeps, ascending.
    """
    return {index: kept[index] for index in range(1, len(kept)) if kept[index] > kept[index - 1] + 1}


Weight = Annotated[float, Field(ge=0.0)]


class Schedule(Section):
    """A coefficient that changes over the training: warm-up from 0 to `value`, then decay to `final * value`."""

    value: Weight
    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup: Fraction = 0.0
    """Fraction of the steps that are warm-up."""
    decay: Fraction = 0.2
    """`wsd` (warm-up, stable, decay) only: fraction of the steps that are decay."""
    final: Weight = 0.0
    """Last value as a multiple of `value`, above 1 for an increase. Not for `constant`."""

    @model_validator(mode="after")
    def _check(self) -> "Schedule":
        if self.kind == "constant" and self.final != 0.0:
            raise ValueError(f"final: expected with kind linear, cosine or wsd, got {self.final:g} with constant")
        return self


Coefficient = Annotated[
    Annotated[Weight, Tag("float")] | Annotated[Schedule, Tag("Schedule")],
    Discriminator(lambda value: "Schedule" if isinstance(value, dict | Schedule) else "float"),
]
"""A number or a Schedule. The discriminator limits a validation error to the form that was written."""


class LossWeights(Section):
    """Coefficients of the terms of the training loss."""

    kd: Coefficient = 0.6
    """Divergence between the output distributions of teacher and student (section `distribution`)."""
    ce: Coefficient = 0.4
    """Cross-entropy with the labels."""
    feature: Coefficient = 0.0
    """Distance between hidden states (section `feature`)."""
    relation: Coefficient = 0.0
    """Distance between the similarities of hidden states (section `relation`)."""


class DistributionSpec(Section):
    """The loss between the output distributions of teacher and student."""

    loss: Annotated[
        Annotated[str, Tag("str")] | Annotated[dict[str, Coefficient], Tag("dict[str]")],
        Discriminator(lambda value: "dict[str]" if isinstance(value, dict) else "str"),
    ] = "forward_kl"
    """A divergence of student/losses/registry.py, or several with their weights in a sum. The training refuses one that
    the cache's target mode cannot support."""
    temperature: float = Field(default=1.0, gt=0.0)
    beta: Fraction = 0.5
    """Mixture weight of the generalised Jensen-Shannon divergence."""
    skew: Fraction = 0.1
    """Mixture weight of the skewed divergences."""

    @model_validator(mode="after")
    def _check(self) -> "DistributionSpec":
        if not self.loss:
            raise ValueError("loss: expected a name, or names with weights, got none")
        return self

    @property
    def weights(self) -> dict[str, Coefficient]:
        """Weights by divergence; a single name has weight 1."""
        return {self.loss: 1.0} if isinstance(self.loss, str) else self.loss


LayerMapping = Annotated[
    dict[int, int] | None,
    BeforeValidator(lambda value: {int(k): v for k, v in value.items()} if isinstance(value, dict) else value),
]
"""Student layers to captured teacher layers. JSON has text keys only, so these are converted."""


class FeatureSpec(Section):
    """The loss between hidden states of teacher and student."""

    loss: Literal["mse", "cosine"] = "mse"
    layer_map: LayerMapping = None
    """Unset: a pruned student's state is matched with the teacher state after the same copied layers; states of other
    students by proportional depth."""
    balance: bool = False
    """Scale the loss to the magnitude of the output loss in the previous step; the first step is not scaled."""
    layer_gap_least_squares: bool = False
    """Before the first step, solve the last matrix in front of each gap of left-out layers by least squares on the
    teacher's captured states. Cf. ReplaceMe (Shopkhoev et al. 2025, arXiv:2505.02819), a training-free replacement of
    transformer blocks by a linear map."""


class RelationSpec(Section):
    """The loss between similarities of hidden states, in the teacher and in the student."""

    loss: Literal["similarity_kl", "gram"] = "similarity_kl"
    window: int = Field(default=128, ge=2)
    """Positions are compared within windows of this many rows of a sequence."""
    heads: int = Field(default=8, ge=1)
    """`similarity_kl` only: attention-like heads into which the states are divided."""
    layer_map: LayerMapping = None
    """As in `feature`."""


class DifferenceSpec(Section):
    """Difference sampling (MiniPLM, Gu et al. 2024): train on what the teacher predicts best against a reference."""

    reference: Name
    """Name of the teacher whose cached label log-probs are the reference; the student does not learn from it."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Fraction of the sequences that is kept."""


class SelectionSpec(Section):
    """Which positions count in the output loss, and which sequences are trained on."""

    by: Literal["all", "student_entropy", "ce_ratio", "teacher_entropy", "label_cost", "random"] = "all"
    """Score of a position. `label_cost` is the teacher's cross-entropy with the label."""
    how: Literal["keep", "weigh"] = "keep"
    """`keep` the positions with the highest scores, or `weigh` every position by its score over its sequence's mean."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """`keep` only: fraction of each sequence's positions."""
    threshold: float | None = None
    """`teacher_entropy` only: keep the positions with at least this entropy, in nats."""
    sequences: DifferenceSpec | None = None

    @model_validator(mode="after")
    def _check(self) -> "SelectionSpec":
        if self.threshold is not None and self.by != "teacher_entropy":
            raise ValueError(f"threshold: expected with by: teacher_entropy, got by: {self.by}")
        if self.share != 1.0 and (self.by == "all" or self.threshold is not None or self.how == "weigh"):
            other = f"by: {self.by}" if self.by == "all" else "a threshold" if self.threshold is not None else "weigh"
            raise ValueError(f"share: expected 1 with {other}, got {self.share:g}")
        if self.how == "weigh" and (self.by in ("all", "random") or self.threshold is not None):
            raise ValueError(
                "how: weigh: expected by: student_entropy, ce_ratio, teacher_entropy or label_cost and no threshold, "
                f"got by: {self.by}, threshold: {self.threshold}"
            )
        return self


class FusionSpec(Section):
    """How the distributions of several teachers are combined into one target."""

    how: Literal["mix", "select", "route"] = "mix"
    """A weighted mixture, the teacher with the highest label log-prob at each position, or one teacher per domain."""
    weights: dict[str, float] = {}
    """`mix` only: weights by teacher, or by `domain:teacher`; equal if unset."""
    by_domain: dict[str, str] = {}
    """`route` only: teachers by domain."""


class LoraSpec(Section):
    """LoRA: train low-rank updates of the target modules instead of their weights (PEFT's `LoraConfig`)."""

    rank: int = Field(default=16, ge=1)
    alpha: float = 32.0
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class TrainingSpec(Section):
    """How a student is trained. A control is trained in the same way on cross-entropy alone."""

    workers: int = Field(default=1, ge=0)
    """Ray Train workers; 0 trains in the job's own process, without Ray."""
    gpus_per_worker: float | None = Field(default=None, ge=0.0)
    """Unset: 1 where the cluster has a GPU for every worker (`workers: 0`: where this machine has one), otherwise 0."""
    cpus_per_worker: float = Field(default=1.0, gt=0.0)
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    epochs: float = Field(default=1.0, gt=0.0)
    max_steps: int | None = Field(default=None, ge=1)
    tokens_per_step: int = Field(default=8192, ge=2)
    """Tokens of one optimizer step over all workers."""
    tokens_per_batch: int = Field(default=2048, ge=2)
    """Maximum tokens of a micro-batch on one worker; sequences are never split."""
    learning_rate: float = Field(default=3e-4, gt=0.0)
    scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "warmup_stable_decay"] = "cosine"
    warmup: Fraction = 0.05
    """Fraction of the steps in which the learning rate increases from 0."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float | None = Field(default=1.0, gt=0.0)
    """Maximum norm of the gradients of a step; null does not clip."""
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """Autocast dtype of the forward pass; weights stay float32. `auto`: bfloat16 where the hardware computes in it."""
    freeze: tuple[str, ...] = ()
    """Prefixes of the names of parameters that are not trained."""
    activation_checkpointing: bool = False
    compile: bool = False
    lora: LoraSpec | None = None
    chunk_rows: int = Field(default=512, ge=1)
    """Rows of the student's logits that are in memory at a time."""
    head_kernel: Literal["auto", "eager"] = "auto"
    """Kernel of the losses on logits. `auto`: Triton on a GPU, PyTorch elsewhere; `eager`: always PyTorch."""
    checkpoint_every_steps: int = Field(default=50, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    losses: LossWeights = LossWeights()
    distribution: DistributionSpec = DistributionSpec()
    feature: FeatureSpec = FeatureSpec()
    relation: RelationSpec = RelationSpec()
    selection: SelectionSpec = SelectionSpec()
    fusion: FusionSpec = FusionSpec()
    min_captured_mass: Fraction = 0.0
    """Refuse a cache whose kept entries have a mean probability mass below this."""
    trackers: tuple[Literal["mlflow", "wandb"], ...] = ()

    @model_validator(mode="after")
    def _check(self) -> "TrainingSpec":
        if self.tokens_per_batch > self.tokens_per_step:
            raise ValueError(
                f"tokens_per_batch: expected at most tokens_per_step ({self.tokens_per_step}), "
                f"got {self.tokens_per_batch}"
            )
        if self.compile and self.parallel == "fsdp2":
            raise ValueError("compile: expected parallel ddp, got fsdp2: compiled sharded weights are untested")
        return self


class EvaluationSpec(Section):
    """How the student is evaluated, on held-out documents."""

    control: Literal["ce", "none"] = "ce"
    """`ce`: also train a control, the same student on cross-entropy alone, and compare with it."""
    batch_tokens: int = Field(default=2048, ge=2)
    max_tokens: int | None = Field(default=None, gt=0)
