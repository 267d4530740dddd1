"""Recipe sections of the capture: corpus, teachers, and which signals are kept."""

from dataclasses import fields
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Fraction, Name, Section
from pipeline.contracts import CaptureSpec, TargetMode


class CorpusSpec(Section):
    """Which documents are read, how they are cut into sequences, and how they are split."""

    source: str
    """`python-docs`, or a path or URI of a .txt, .jsonl or .parquet file, or of a folder of these."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Cut no more training sequences after this many tokens (of the teacher's tokenizer)."""
    sequence_length: int = Field(default=512, ge=2)
    """Maximum tokens of a sequence. Consecutive windows of a document overlap by one token, so that every token but
    the document's first is a label."""
    held_out: Fraction = 0.1
    """Fraction of the documents that are kept for evaluation only."""
    max_held_out_tokens: int | None = Field(default=None, gt=0)
    """Unset: `max_tokens` in proportion to `held_out`."""
    domain: str | None = None
    """Domain of documents that have none of their own."""
    loss_on: Literal["all", "assistant"] = "all"
    """Which tokens of a chat count as labels."""


class SamplingSpec(Section):
    """How a teacher samples its answers to the corpus' prompts."""

    temperature: float = Field(default=1.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    max_tokens: int = Field(default=256, gt=0)
    seed: int = 0


class PlacementSpec(Section):
    """Ray resources of each of a teacher's replicas."""

    cpus: float = Field(default=1.0, ge=0.0)
    gpus: float | None = Field(default=None, ge=0.0)
    """GPUs of each rank of a replica, at most 1 with several ranks. Unset: 1 if the cluster has GPUs, otherwise 0."""
    resources: dict[str, float] = {}
    label_selector: dict[str, str] = {}


class TeacherSpec(Section):
    """One teacher: its model, its inference engine, and its replicas."""

    name: Name
    model: str
    """A name that ships (`smollm2-135m-instruct`), a local folder, or a hub id with a revision."""
    revision: str | None = None
    """Commit of a hub id: 40 hex digits."""
    engine: Literal["vllm", "transformers", "dummy"] = "vllm"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """`auto`: bfloat16 where the hardware computes in it, float32 elsewhere."""
    quantization: str | None = None
    replicas: int | tuple[int, int] = 1
    """Number of replicas, or `[min, max]`."""
    tensor_parallel: int = Field(default=1, ge=1)
    pipeline_parallel: int = Field(default=1, ge=1)
    max_batched_tokens: int = Field(default=2048, ge=16)
    """Tokens of one prefill step, as vLLM's `max_num_batched_tokens`; bounds the memory of a batch."""
    chunk_rows: int = Field(default=256, ge=1)
    """Rows of logits that are in memory at a time."""
    kv_cache_gib: float = Field(default=1.0, gt=0.0)
    """KV cache on a CPU, in GiB."""
    gpu_memory_share: Fraction = 0.85
    """vLLM's `gpu_memory_utilization`, multiplied by `placement.gpus` where that is below 1."""
    placement: PlacementSpec = PlacementSpec()
    sampling: SamplingSpec | None = None
    """If set, the corpus contains prompts: the teacher answers them, and answers are scored (see `capture.answers`)."""
    options: dict[str, float | int | str | bool] = {}
    """Settings of the dummy engine (vocabulary, width, delays, faults)."""

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
        """Number of processes of one replica (tensor parallel size times pipeline parallel size)."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def replica_range(self) -> tuple[int, int]:
        """Minimum and maximum number of replicas."""
        return (self.replicas, self.replicas) if isinstance(self.replicas, int) else self.replicas

    @property
    def gpu_fraction(self) -> float:
        """Fraction of a GPU that each rank uses; 1 if `placement.gpus` is unset."""
        return min(self.placement.gpus or 1.0, 1.0)


class CaptureSettings(Section):
    """Which signals are kept, and which sequences are audited."""

    mode: Literal["topk", "topp", "unbiased", "sampled"] = "topk"
    k: int = Field(default=64, ge=1)
    """Entries per position: exactly (topk, unbiased) or at most (topp, sampled)."""
    top_p: float = Field(default=0.95, gt=0.0, lt=1.0)
    """`topp` only: probability mass of the kept entries, unless `k` is reached first."""
    min_k: int = Field(default=1, ge=1)
    """`topp` only: minimum entries per position."""
    draws: int = Field(default=64, ge=1)
    """`sampled` only: draws with replacement per position."""
    temperatures: tuple[Annotated[float, Field(gt=0.0)], ...] = (1.0,)
    """Temperatures whose log-partition is kept."""
    any_temperature: bool = False
    """`topk` and `topp` only: keep three tail scalars that approximate the tail at any temperature from 1 to 2.5."""
    boundary: bool = False
    """Keep the log-mass of the tokens that start a word."""
    hidden_layers: tuple[int, ...] = ()
    """0..layers: the residual stream after that many layers (0: embeddings); -1: the state after the final norm."""
    hidden_codec: Literal["bf16", "int8"] = "bf16"
    audit: Fraction = 0.02
    """Fraction of the training sequences whose exact distribution is kept too. Held-out sequences always are."""
    unit_sequences: int = Field(default=8, ge=1)
    """Sequences of a unit, that is of one shard; a failed unit is captured again."""
    quarantine_cap: Fraction = 0.01
    """Fraction of the sequences, and of the prompts, that may be quarantined before the capture stops."""
    answers: Literal["own", "all"] = "own"
    """Which answers a teacher scores where teachers have `sampling`: its own, or those of all teachers. With `all`,
    every cache contains the same sequences, as a training with several teachers requires."""

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
        """Return the settings as the record that engines and caches use."""
        shared = self.model_dump(include={field.name for field in fields(CaptureSpec)} - {"mode"})
        return CaptureSpec(mode=TargetMode(self.mode), seed=seed, **shared)
