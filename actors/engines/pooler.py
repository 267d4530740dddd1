"""The part of capture that runs inside vLLM: a causal LM, registered again as a pooling model that gives signals.

A pooling model gets the state after the final norm of every prefilled token, and may return one tensor a request. Ours
runs the model's own `compute_logits` over chunks of rows, reduces each chunk to signals, and returns packed rows (see
`packing`). Chunked prefill works: rows of a request's earlier steps wait in vLLM's own state of that request, and the
label of a step's last row is the prompt's next token. Hidden layers arrive through the interface that vLLM's models
have for EAGLE-3 drafters, `set_aux_hidden_state_layers`.

`register` is a vLLM plug-in: every process of an engine calls it, and learns of the models under names of their own
(`Stillhouse` and the architecture), so that other uses of vLLM in the same environment see nothing of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.models.registry import ModelRegistry
from vllm.v1.pool.metadata import PoolingMetadata

from actors.engines.packing import pack_rows
from actors.engines.word_starts import word_starts
from actors.signals.reduce import reduce_rows
from actors.signals.rows import RowSignals, concatenate
from actors.signals.sampling import draws_per_row, row_uniforms
from pipeline.contracts import CaptureSpec, TargetMode

PREFIX = "Stillhouse"
TASK = "token_embed"


@dataclass(frozen=True, slots=True)
class PoolerSettings:
    """What the pooler must know, as it travels in vLLM's `additional_config`: plain JSON."""

    spec: CaptureSpec
    chunk_rows: int

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `from_json` in whichever process hosts the model."""
        fields = {name: getattr(self.spec, name) for name in CaptureSpec.__dataclass_fields__}
        return {"stillhouse": {"spec": fields | {"mode": self.spec.mode.value}, "chunk_rows": self.chunk_rows}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "PoolerSettings":
        """The settings out of `additional_config`."""
        own = values["stillhouse"]
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in own["spec"].items()}
        fields["mode"] = TargetMode(fields["mode"])
        return cls(CaptureSpec(**fields), own["chunk_rows"])


@dataclass(frozen=True, slots=True)
class _Step:
    """One request's share of a prefill step: rows `start..end` of the batch are its tokens `first..`."""

    start: int
    end: int
    first: int
    tokens: int
    sequence_id: str
    audited: bool


class SignalPooler(Pooler):  # type: ignore[misc]
    """Turns the states of a step into packed signal rows."""

    def __init__(self, model: Any, vllm_config: VllmConfig) -> None:
        super().__init__()
        self._settings = PoolerSettings.from_json(vllm_config.additional_config)
        self._compute_logits = model.compute_logits
        self._hidden: list[Tensor] = []
        self._boundary_V: Tensor | None = None
        if self._settings.spec.boundary:
            config = vllm_config.model_config
            self._boundary_V = torch.from_numpy(word_starts(Path(config.model), config.get_vocab_size()))

    def get_supported_tasks(self) -> set[Any]:
        """The task under which vLLM lets a pooler return one row for each token."""
        return {TASK}

    def get_pooling_updates(self, task: Any) -> PoolingParamsUpdate:
        """Labels come from the prompt's ids."""
        return PoolingParamsUpdate(requires_token_ids=True)

    def hold(self, hidden: list[Tensor]) -> None:
        """Keep the layers of the step that is about to be pooled, in ascending order."""
        self._hidden = hidden

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> list[Tensor | None]:
        """Packed rows of every request that this step finishes, None for the others."""
        steps = _steps(pooling_metadata)
        rows = self._reduce(hidden_states, _labels(steps, pooling_metadata), self._uniforms(steps))
        layers, self._hidden = self._layers(hidden_states), []
        if rows is None:  # another rank of a tensor-parallel group has the logits, and answers
            return [None] * len(steps)
        return [
            self._answer(step, rows, layers, hidden_states, state.hidden_states_cache)
            for step, state in zip(steps, pooling_metadata.pooling_states, strict=True)
        ]

    def _reduce(self, state_RD: Tensor, label_R: Tensor, uniform_RU: Tensor | None) -> RowSignals | None:
        device, spec = state_RD.device, self._settings.spec
        label_R = label_R.to(device)
        parts = []
        for start in range(0, len(state_RD), self._settings.chunk_rows):
            chunk = slice(start, start + self._settings.chunk_rows)
            logits = self._compute_logits(state_RD[chunk])
            if logits is None:
                continue
            uniform = None if uniform_RU is None else uniform_RU[chunk].to(device)
            parts.append(reduce_rows(logits, label_R[chunk], spec, uniform, self._boundary_V))
            del logits
        return concatenate(parts) if parts else None

    def _uniforms(self, steps: list[_Step]) -> Tensor | None:
        spec = self._settings.spec
        if draws_per_row(spec) == 0:
            return None
        drawn = [row_uniforms(spec, s.sequence_id, s.tokens)[s.first : s.first + s.end - s.start] for s in steps]
        return torch.from_numpy(np.concatenate(drawn))

    def _layers(self, state_RD: Tensor) -> list[Tensor]:
        """The spec's layers, in its order."""
        asked = self._settings.spec.hidden_layers
        held = dict(zip(sorted(i for i in asked if i >= 0), self._hidden, strict=False))
        return [state_RD if i == -1 else held[i] for i in asked]

    def _answer(
        self, step: _Step, rows: RowSignals, layers: list[Tensor], state_RD: Tensor, waiting: list[Tensor]
    ) -> Tensor | None:
        """Pack the step's rows behind those that wait; give all of them once the request is done."""
        done = step.first + step.end - step.start == step.tokens
        own = slice(step.start, step.end - 1 if done else step.end)  # the last token has no label
        packed = pack_rows(
            _sliced(rows, own), [layer[own] for layer in layers], state_RD[own] if step.audited else None
        )
        if not done:
            waiting.append(packed)
            return None
        whole = torch.cat([*waiting, packed]) if waiting else packed
        waiting.clear()
        return whole


def _steps(metadata: PoolingMetadata) -> list[_Step]:
    cursor = metadata.get_pooling_cursor()
    counts = cursor.num_scheduled_tokens_cpu.tolist()
    seen, totals = cursor.seq_lens_cpu.tolist(), metadata.prompt_lens.tolist()
    steps, start = [], 0
    for count, so_far, tokens, params in zip(counts, seen, totals, metadata.pooling_params, strict=True):
        own = params.extra_kwargs or {}  # None in vLLM's own warm-up
        steps.append(
            _Step(
                start,
                start + count,
                so_far - count,
                tokens,
                own.get("sequence_id", ""),
                bool(own.get("audited", False)),
            )
        )
        start += count
    return steps


def _labels(steps: list[_Step], metadata: PoolingMetadata) -> Tensor:
    """Each row's next token; 0 for a sequence's last, whose row is dropped."""
    label_R = torch.zeros(steps[-1].end, dtype=torch.long)
    for step, ids in zip(steps, metadata.get_prompt_token_ids_cpu(), strict=True):
        following = ids[step.first + 1 : step.first + 1 + step.end - step.start]
        label_R[step.start : step.start + len(following)] = following
    return label_R


def _sliced(rows: RowSignals, own: slice) -> RowSignals:
    columns: dict[str, Any] = {}
    for name in RowSignals.__dataclass_fields__:
        column = getattr(rows, name)
        columns[name] = None if column is None else column[own]
    return RowSignals(**columns)


def capture_class(original: type[Any]) -> type[Any]:
    """The causal LM again, as a pooling model with a SignalPooler."""

    class CaptureModel(original):  # type: ignore[misc]
        is_pooling_model = True

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.pooler = SignalPooler(self, vllm_config)
            layers = [i for i in PoolerSettings.from_json(vllm_config.additional_config).spec.hidden_layers if i >= 0]
            if layers:
                self.set_aux_hidden_state_layers(tuple(sorted(layers)))

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            """The original's forward; hidden layers stay with the pooler instead of being returned."""
            output = super().forward(*args, **kwargs)
            if isinstance(output, tuple):
                output, hidden = output
                self.pooler.hold(hidden)
            return output

    CaptureModel.__name__ = CaptureModel.__qualname__ = PREFIX + original.__name__
    return CaptureModel


def register() -> None:
    """Make every architecture that vLLM knows available under its capture name. A vLLM general plug-in."""
    for architecture in list(ModelRegistry.get_supported_archs()):
        name = PREFIX + architecture
        if not architecture.startswith(PREFIX) and name not in ModelRegistry.models:
            ModelRegistry.register_model(name, f"{__name__}:{name}")


def __getattr__(name: str) -> type[Any]:
    """Build the capture class when vLLM first asks for it by name."""
    architecture = name.removeprefix(PREFIX)
    if name == architecture or architecture not in ModelRegistry.models:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return capture_class(ModelRegistry.models[architecture].load_model_cls())
