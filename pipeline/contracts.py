"""Records that packages exchange, and the contracts that they keep. Loads no torch, Ray or Parquet.

Position contract: row `t` of every signal is the teacher's view of token `t+1` given tokens `0..t`. A sequence of n
tokens has n-1 signal rows, so `label_T = input_ids[1:]` and `loss_mask[1:]` line up with every signal.

Shape suffixes, one letter for one meaning in the whole project (`logprob_TK` has shape [T, K]; T = N-1 for a sequence):

    A  sums of a fused reduction       J  buckets: K entries and the tail    S  sequences
    B  batch, or micro-batches         K  kept entries                       T  signal rows
    C  temperatures                    L  captured hidden layers             U  random numbers of a row
    D  hidden width                    M  teachers of a mixture              V  vocabulary
    E  teacher's width beside a D      N  tokens                             W  rows of a window
    F  candidates for the K            P  parts of a loss                    X  bytes of a packed row
    G  groups of logits, windows       Q  width of a head                    Z  histogram bins
    H  attention heads                 R  rows of a block or chunk of T
    I  input features of a matrix

Entries contract: `entry_id_TK` and `entry_logweight_TK` hold a row's kept entries by falling weight (ties: lower id
first). A weight is the share of the target that the entry carries: the teacher's probability in `topk` and `topp`,
probability (head) or threshold (tail) in `unbiased`, draws / total draws in `sampled`. Rows with fewer entries than K
end in padding: id 0, log-weight -inf. `tail_logmass_T` is the log of the mass outside the entries (-inf where the
weights sum to 1).

Hidden layer `i` in 0..layers is the residual stream after `i` decoder layers (0: the embeddings), before any final
norm; `-1` is the state after the final norm, which the LM head reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

IntArray: TypeAlias = NDArray[np.int32]
MaskArray: TypeAlias = NDArray[np.uint8]
FloatArray: TypeAlias = NDArray[np.float32]
Bf16Array: TypeAlias = NDArray[np.uint16]
"""bfloat16 values by their bits; `pipeline.bfloat16` converts them."""

Split: TypeAlias = Literal["train", "held_out"]


class TargetMode(StrEnum):
    """How the kept entries of a teacher's distribution are chosen."""

    TOPK = "topk"
    TOPP = "topp"
    UNBIASED = "unbiased"
    SAMPLED = "sampled"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Document:
    """One input text or chat: exactly one of `text` and `messages` is set."""

    id: str
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    domain: str | None = None
    prompt: int = 0
    """Length of the prompt, in characters (text) or turns (chat); 0: none. Only tokens after it are labels."""
    finished: bool = True
    """False: generation stopped at max_tokens, so the tokens that close the turn are not labels."""
    prompt_id: str | None = None
    """Of an answer: the id of its prompt. All answers to one prompt are in the same split."""

    @property
    def split_id(self) -> str:
        """The id whose hash decides the split."""
        return self.id if self.prompt_id is None else self.prompt_id


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A window of one document under one tokenizer: what a teacher reads and a student trains on.

    `loss_mask_N[i]` is 1 where token i counts as a label (never for token 0). `byte_end_N[i]` is where token i ends
    in the document's UTF-8 bytes; `byte_start` is where the first token begins.
    """

    sequence_id: str
    document_id: str
    domain: str | None
    split: Split
    input_ids_N: IntArray
    loss_mask_N: MaskArray
    byte_end_N: IntArray
    byte_start: int = 0
    audited: bool = False
    """Whether the exact distribution is stored too, as the state that the LM head reads."""


@dataclass(frozen=True, slots=True)
class Unit:
    """The sequences of one shard: the smallest thing that is captured, committed, retried and quarantined."""

    unit_id: str
    split: Split
    sequences: tuple[TokenSequence, ...]


@dataclass(frozen=True, slots=True)
class CaptureSpec:
    """Signals to capture. Every field changes stored bytes, so all of them are in the fingerprint."""

    mode: TargetMode = TargetMode.TOPK
    k: int = 64
    """Entries a row: exactly (`topk`, `unbiased`), at most (`topp`, `sampled`)."""
    top_p: float = 0.95
    """`topp` only: the mass that the kept prefix reaches unless `k` caps it."""
    min_k: int = 1
    """`topp` only: the fewest entries a row."""
    draws: int = 64
    """`sampled` only: draws with replacement; `k` bounds the distinct ids."""
    temperatures: tuple[float, ...] = (1.0,)
    """Log-partitions are kept for each of these. At 1 it is 0 by definition and takes no bytes."""
    any_temperature: bool = False
    """Keep three tail scalars from which the tail at any temperature in [1, 2.5] can be rebuilt."""
    boundary: bool = False
    """Keep the log-mass of the tokens that start a word."""
    hidden_layers: tuple[int, ...] = ()
    hidden_codec: Literal["bf16", "int8"] = "bf16"
    seed: int = 0
    """Drives the sampling modes, as a pure function of (seed, sequence id, row)."""


@dataclass(frozen=True, slots=True)
class Signals:
    """Teacher signals of one sequence; the module docstring defines rows and entries."""

    entry_id_TK: IntArray
    entry_logweight_TK: FloatArray
    tail_logmass_T: FloatArray
    label_logprob_T: FloatArray
    entropy_T: FloatArray
    """Nats, of the whole distribution at temperature 1."""
    log_partition_TC: FloatArray
    """`log sum_v exp(log p_v / temperature)` for each of the spec's temperatures, in its order."""
    tail_shape_T3: FloatArray | None = None
    """S(1/2), S'(1/2), S'(1) of the tail's log-sum S(b) = log sum_{v not kept} exp(b log p_v)."""
    boundary_logmass_T: FloatArray | None = None
    hidden_TLD: Bf16Array | None = None
    exact_hidden_TD: Bf16Array | None = None
    """Audited sequences only: the state that the LM head reads, as the teacher computed it."""


@dataclass(frozen=True, slots=True)
class ScoredSequence:
    """One row of a shard."""

    sequence: TokenSequence
    signals: Signals


@dataclass(frozen=True, slots=True)
class TeacherDescription:
    """A teacher as its engine reports it. Stored in `teacher.json`."""

    name: str
    architecture: str
    vocabulary: int
    """Width of the LM head's output, which may exceed the tokenizer's ids."""
    layers: int
    hidden_width: int
    dtype: str
    engine: str
    engine_version: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LmHead:
    """The matrix from the state after the final norm to logits: `logits = scale * (state @ weight.T + bias)`."""

    weight_VD: Bf16Array
    bias_V: FloatArray | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    """`logits = cap * tanh(logits / cap)` afterwards, where the model has one."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A generated text: its token ids, prompt first."""

    input_ids_N: IntArray
    prompt_tokens: int
    finished: bool = True
    """True: the model generated an end token, which is left out."""


class Engine(Protocol):
    """A hosted teacher. `score` returns results in input order. Raises RowError and EngineDead."""

    def describe(self) -> TeacherDescription:
        """Return the teacher's description."""

    def score(self, sequences: Sequence[TokenSequence]) -> list[Signals]:
        """Return the signals of every sequence, with `exact_hidden_TD` for those that are audited."""

    def lm_head(self) -> LmHead | None:
        """Return the LM head, or None where it is unavailable."""

    def close(self) -> None:
        """Free the memory."""
