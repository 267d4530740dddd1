"""The student's half of a recipe: where it starts, what it learns from, and how it is measured."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from pipeline.config.base import Name, Section, Share


class StudentSpec(Section):
    """One student: exactly one of `from_teacher`, `checkpoint` and `config` says where it starts."""

    name: Name = "student"
    from_teacher: Name | None = None
    """Copy layers out of this teacher's checkpoint files, one by one."""
    layers: int | tuple[int, ...] | None = None
    """With `from_teacher`: how many layers are kept (spread evenly), or exactly which."""
    checkpoint: str | None = None
    """Start from this model: a name that ships, a local folder, or a hub id with a revision."""
    revision: str | None = None
    config: dict[str, Any] | None = None
    """Start from random weights under this transformers config (`model_type` and its sizes)."""
    seed: int | None = None
    """Overrides the recipe's seed for this student."""

    @field_validator("layers", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> "StudentSpec":
        starts = [self.from_teacher, self.checkpoint, self.config]
        if sum(start is not None for start in starts) != 1:
            raise ValueError("expected exactly one of from_teacher, checkpoint and config")
        if (self.layers is None) != (self.from_teacher is None):
            raise ValueError("layers: expected with from_teacher, and only there")
        return self


def layers_after_gaps(kept: Sequence[int]) -> dict[int, int]:
    """Gaps between two of `kept` layers: how many are kept in front of each, and which one lies behind it."""
    return {place: kept[place] for place in range(1, len(kept)) if kept[place] > kept[place - 1] + 1}


Weight = Annotated[float, Field(ge=0.0)]


class Schedule(Section):
    """A coefficient that moves over the run: from 0 to `value`, and on to `final` times that."""

    value: Weight
    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup: Share = 0.0
    """Share of the steps over which it climbs from 0."""
    decay: Share = 0.2
    """`wsd` only: share of the steps, at the end, over which it falls."""
    final: Weight = 0.0
    """Where it ends, as a multiple of `value`: above 1, and it rises. Not for `constant`."""

    @model_validator(mode="after")
    def _check(self) -> "Schedule":
        if self.kind == "constant" and self.final != 0.0:
            raise ValueError(f"final: expected with kind linear, cosine or wsd, got {self.final:g} with constant")
        return self


Coefficient = Annotated[
    Annotated[Weight, Tag("float")] | Annotated[Schedule, Tag("Schedule")],
    Discriminator(lambda value: "Schedule" if isinstance(value, dict | Schedule) else "float"),
]
"""Told apart by what is there, so that a mistake is answered for the one form that was meant."""


def _coefficient(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


class LossWeights(Section):
    """How much each way of passing knowledge counts in the sum."""

    kd: Coefficient = 0.6
    """Output distributions."""
    ce: Coefficient = 0.4
    """Plain cross-entropy with the label."""
    feature: Coefficient = 0.0
    """Hidden states."""
    relation: Coefficient = 0.0
    """Similarities between hidden states."""

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return _coefficient(value)


class DistributionSpec(Section):
    """The loss between output distributions."""

    loss: Annotated[
        Annotated[str, Tag("str")] | Annotated[dict[str, Coefficient], Tag("dict[str]")],
        Discriminator(lambda value: "dict[str]" if isinstance(value, dict) else "str"),
    ] = "forward_kl"
    """One of the registry in student/losses, or several, each with its weight in one sum. What a target mode cannot
    support is refused."""
    temperature: float = Field(default=1.0, gt=0.0)
    beta: Share = 0.5
    """Mixture weight of the generalised Jensen-Shannon divergence."""
    skew: Share = 0.1

    @field_validator("loss", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return {name: _coefficient(weight) for name, weight in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _check(self) -> "DistributionSpec":
        if not self.loss:
            raise ValueError("loss: expected a name, or names with weights, got none")
        return self

    @property
    def weights(self) -> dict[str, Coefficient]:
        """Every divergence with its weight; 1 where the recipe names one alone."""
        return {self.loss: 1.0} if isinstance(self.loss, str) else self.loss


class FeatureSpec(Section):
    """The loss between hidden states."""

    loss: Literal["mse", "cosine"] = "mse"
    layer_map: dict[int, int] | None = None
    """Student layer: teacher layer (as captured). Unset: by the layers that were inherited, or spread evenly."""
    balance: bool = False
    """Scale the loss to the size that the output loss had in the step before; in the first step it stays as it is."""
    layer_gap_least_squares: bool = False
    """Before the first step, let the layer in front of left-out ones make up for them: least squares on states."""

    @field_validator("layer_map", mode="before")
    @classmethod
    def _keys(cls, value: Any) -> Any:
        """JSON knows only text as keys."""
        return {int(k): v for k, v in value.items()} if isinstance(value, dict) else value


class RelationSpec(Section):
    """The loss between similarities of hidden states."""

    loss: Literal["similarity_kl", "gram"] = "similarity_kl"
    window: int = Field(default=128, ge=2)
    heads: int = Field(default=8, ge=1)
    layer_map: dict[int, int] | None = None

    _keys = field_validator("layer_map", mode="before")(FeatureSpec._keys.__func__)  # type: ignore[attr-defined]


class DifferenceSpec(Section):
    """Train on the sequences that the teacher says better than a small reference does (difference sampling)."""

    reference: Name
    """The recipe's teacher whose cache holds the reference's label log-probs; it teaches nothing itself."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5


class SelectionSpec(Section):
    """Which positions the output loss is taken at, and which sequences are trained on."""

    by: Literal["all", "student_entropy", "ce_ratio", "teacher_entropy", "label_cost", "random"] = "all"
    """A score of every position; `label_cost` is what the label costs the teacher."""
    how: Literal["keep", "weigh"] = "keep"
    """`keep` those of the highest scores; `weigh` every position by its score over its sequence's mean."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """`keep` only: share of each sequence's positions."""
    threshold: float | None = None
    """`teacher_entropy` only: keep positions whose teacher entropy (nats) is at least this."""
    sequences: DifferenceSpec | None = None

    @model_validator(mode="after")
    def _check(self) -> "SelectionSpec":
        if self.threshold is not None and self.by != "teacher_entropy":
            raise ValueError(f"threshold: expected with by: teacher_entropy, got by: {self.by}")
        if self.share != 1.0 and (self.by == "all" or self.threshold is not None or self.how == "weigh"):
            beside = f"by: {self.by}" if self.by == "all" else "a threshold" if self.threshold is not None else "weigh"
            raise ValueError(f"share: expected 1 with {beside}, got {self.share:g}")
        if self.how == "weigh" and (self.by in ("all", "random") or self.threshold is not None):
            raise ValueError(
                "how: weigh: expected by: student_entropy, ce_ratio, teacher_entropy or label_cost and no threshold, "
                f"got by: {self.by}, threshold: {self.threshold}"
            )
        return self


class FusionSpec(Section):
    """How several teachers become one target."""

    how: Literal["mix", "select", "route"] = "mix"
    weights: dict[str, float] = {}
    """`mix`: teacher, or `domain:teacher`, to weight (equal if unset)."""
    by_domain: dict[str, str] = {}
    """`route`: domain to teacher."""


class LoraSpec(Section):
    """Train a low-rank addition instead of the weights themselves."""

    rank: int = Field(default=16, ge=1)
    alpha: float = 32.0
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class TrainingSpec(Section):
    """How a student is trained. A control is trained the same way, on cross-entropy alone."""

    workers: int = Field(default=1, ge=0)
    """Ray Train workers; 0 trains inside the job's own process."""
    gpus_per_worker: float | None = Field(default=None, ge=0.0)
    """Unset: 1 where the cluster has a GPU for every worker (`workers: 0`: where this machine has one), otherwise 0."""
    cpus_per_worker: float = Field(default=1.0, gt=0.0)
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    epochs: float = Field(default=1.0, gt=0.0)
    max_steps: int | None = Field(default=None, ge=1)
    tokens_per_step: int = Field(default=8192, ge=2)
    """Tokens of one optimizer step over all workers."""
    tokens_per_batch: int = Field(default=2048, ge=2)
    """Tokens of one forward pass on one worker; a sequence is never cut."""
    learning_rate: float = Field(default=3e-4, gt=0.0)
    scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine", "warmup_stable_decay"] = "cosine"
    warmup: Share = 0.05
    weight_decay: float = Field(default=0.0, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float | None = Field(default=1.0, gt=0.0)
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    """What a forward pass computes with; weights are kept in float32. `auto`: bfloat16 where the hardware has it."""
    freeze: tuple[str, ...] = ()
    """Parameters whose name starts with one of these stay as they are."""
    activation_checkpointing: bool = False
    compile: bool = False
    lora: LoraSpec | None = None
    chunk_rows: int = Field(default=512, ge=1)
    """Rows of student logits that exist at a time."""
    head_kernel: Literal["auto", "eager"] = "auto"
    """What goes through them. `auto`: Triton on a GPU, plain torch elsewhere."""
    checkpoint_every_steps: int = Field(default=50, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    losses: LossWeights = LossWeights()
    distribution: DistributionSpec = DistributionSpec()
    feature: FeatureSpec = FeatureSpec()
    relation: RelationSpec = RelationSpec()
    selection: SelectionSpec = SelectionSpec()
    fusion: FusionSpec = FusionSpec()
    min_captured_mass: Share = 0.0
    """Refuse a cache whose entries hold less of the teacher's probability than this, on average."""
    trackers: tuple[Literal["mlflow", "wandb"], ...] = ()

    @field_validator("betas", "freeze", "trackers", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> "TrainingSpec":
        if self.tokens_per_batch > self.tokens_per_step:
            raise ValueError(
                f"tokens_per_batch: expected at most tokens_per_step ({self.tokens_per_step}), "
                f"got {self.tokens_per_batch}"
            )
        if self.compile and self.parallel == "fsdp2":
            raise ValueError("compile: expected parallel ddp, got fsdp2: compiled weights in parts are untested")
        return self


class EvaluationSpec(Section):
    """How the student is measured, on held-out documents."""

    control: Literal["ce", "none"] = "ce"
    """`ce`: train a second student on the text alone, and measure against it."""
    batch_tokens: int = Field(default=2048, ge=2)
    max_tokens: int | None = Field(default=None, gt=0)
