"""The teachers' half of a recipe: the text, the teachers, and the signals they are asked for."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Name, Section, Share
from pipeline.contracts import CaptureSpec, TargetMode


class CorpusSpec(Section):
    """Which documents, how they are cut, and how they are split."""

    source: str
    """`python-docs`, or a path or URI of a .txt, .jsonl or .parquet file, or of a folder of these."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Stop after this many training tokens (of the teacher's tokenizer)."""
    sequence_length: int = Field(default=512, ge=2)
    """Tokens a sequence, at most. Windows of one document share one token, so every token but the first is a label."""
    held_out: Share = 0.1
    """Share of the documents that no student trains on."""
    max_held_out_tokens: int | None = Field(default=None, gt=0)
    domain: str | None = None
    """Domain of documents that carry none."""
    loss_on: Literal["all", "assistant"] = "all"
    """Which tokens of a chat count as labels."""


class SamplingSpec(Section):
    """How a teacher writes, in `generate` mode."""

    temperature: float = Field(default=1.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    max_tokens: int = Field(default=256, gt=0)
    seed: int = 0


class PlacementSpec(Section):
    """Where a teacher's replicas run, in Ray's own words."""

    cpus: float = Field(default=1.0, ge=0.0)
    gpus: float | None = Field(default=None, ge=0.0)
    """GPUs a replica and rank. Unset: 1 where the cluster has GPUs, otherwise 0. Several ranks: at most 1 each."""
    resources: dict[str, float] = {}
    label_selector: dict[str, str] = {}


class TeacherSpec(Section):
    """One teacher: its model, the engine that hosts it, and how many copies run."""

    name: Name
    model: str
    """A name that ships (`smollm2-135m-instruct`), a local folder, or a hub id with a revision."""
    revision: str | None = None
    """Commit of a hub id: 40 hex digits."""
    engine: Literal["vllm", "transformers", "dummy"] = "vllm"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What it computes with. `auto`: bfloat16 where the hardware has it, float32 elsewhere."""
    quantization: str | None = None
    replicas: int | tuple[int, int] = 1
    """Copies of the teacher: a number, or `[min, max]`."""
    tensor_parallel: int = Field(default=1, ge=1)
    pipeline_parallel: int = Field(default=1, ge=1)
    max_batched_tokens: int = Field(default=2048, ge=16)
    """Tokens in one prefill step; bounds the memory of a batch."""
    chunk_rows: int = Field(default=256, ge=1)
    """Rows of logits that exist at a time."""
    kv_cache_gib: float = Field(default=1.0, gt=0.0)
    """Memory for keys and values on a CPU."""
    gpu_memory_share: Share = 0.85
    """Share of a rank's GPU, or of its fraction of one, that the engine takes."""
    placement: PlacementSpec = PlacementSpec()
    sampling: SamplingSpec | None = None
    """Set: the teacher answers the corpus' prompts, and answers are scored (see `capture.answers`)."""
    options: dict[str, float | int | str | bool] = {}
    """The dummy engine's settings (vocabulary, width, delays, faults)."""

    @field_validator("replicas", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> "TeacherSpec":
        low, high = self.replica_range
        if not 1 <= low <= high:
            raise ValueError(f"replicas: expected 1 <= min <= max, got {self.replicas}")
        if self.ranks > 1 and (self.placement.gpus or 0) > 1:
            raise ValueError(f"placement.gpus: expected at most 1 for each of several ranks, got {self.placement.gpus}")
        if self.options and self.engine != "dummy":
            raise ValueError(f"options: only the dummy engine has options, got engine {self.engine}")
        return self

    @property
    def ranks(self) -> int:
        """Processes of one replica's engine."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def replica_range(self) -> tuple[int, int]:
        """(min, max) copies."""
        return (self.replicas, self.replicas) if isinstance(self.replicas, int) else self.replicas

    @property
    def gpu_fraction(self) -> float:
        """How much of a GPU a rank has; whole ones where the recipe does not say."""
        return min(self.placement.gpus or 1.0, 1.0)


class CaptureSettings(Section):
    """Which signals are kept, and how much of them is also kept exactly."""

    mode: Literal["topk", "topp", "unbiased", "sampled"] = "topk"
    k: int = Field(default=64, ge=1)
    """Entries a position: exactly (topk, unbiased), at most (topp, sampled)."""
    top_p: float = Field(default=0.95, gt=0.0, lt=1.0)
    min_k: int = Field(default=1, ge=1)
    draws: int = Field(default=64, ge=1)
    temperatures: tuple[Annotated[float, Field(gt=0.0)], ...] = (1.0,)
    any_temperature: bool = False
    """Keep what gives the teacher at any temperature from 1 to 2.5 (topk, topp)."""
    boundary: bool = False
    hidden_layers: tuple[int, ...] = ()
    """0..layers: the stream after that many layers; -1: the state after the final norm."""
    hidden_codec: Literal["bf16", "int8"] = "bf16"
    audit: Share = 0.02
    """Share of the training sequences whose exact distribution is kept too. Held-out sequences always are."""
    unit_sequences: int = Field(default=8, ge=1)
    """Sequences a unit: what one shard holds and one failure can cost."""
    quarantine_cap: Share = 0.01
    """Share of the sequences, and of the prompts, that may be quarantined before the capture stops."""
    answers: Literal["own", "all"] = "own"
    """Which answers a teacher scores, where teachers have `sampling`: its own, or those of all of them, so that every
    cache holds the same sequences and a student may learn from several teachers at once."""

    @field_validator("temperatures", "hidden_layers", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> "CaptureSettings":
        if self.min_k > self.k:
            raise ValueError(f"min_k: expected at most k (k={self.k}), got {self.min_k}")
        if self.any_temperature and self.mode in ("unbiased", "sampled"):
            raise ValueError(
                f"any_temperature: expected mode topk or topp, whose entries leave a tail, got {self.mode}"
            )
        for name in ("temperatures", "hidden_layers"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name}: expected no value twice, got {list(values)}")
        return self

    def spec(self, seed: int) -> CaptureSpec:
        """What an engine is asked for."""
        return CaptureSpec(
            mode=TargetMode(self.mode),
            k=self.k,
            top_p=self.top_p,
            min_k=self.min_k,
            draws=self.draws,
            temperatures=self.temperatures,
            any_temperature=self.any_temperature,
            boundary=self.boundary,
            hidden_layers=self.hidden_layers,
            hidden_codec=self.hidden_codec,
            seed=seed,
        )
