"""The pooling model that runs inside vLLM: a causal LM whose pooler reduces logits to signals.

vLLM calls a model's pooler with the state after the final norm of every token of a prefill step; the pooler returns one
tensor for each request that the step finishes. `SignalPooler` runs the model's own `compute_logits` on chunks of rows,
reduces each chunk to signals and returns packed rows (see `packing`). Chunked prefill: packed rows of a request's
earlier steps are kept in vLLM's `PoolingStates`, and the label of a step's last row is the prompt's next token. Hidden
layers come from vLLM's EAGLE-3 interface, `set_aux_hidden_state_layers`.

`register` is a vLLM plug-in (entry point `vllm.general_plugins`), called in every process of an engine. The models are
registered under names of their own, `Stillhouse` plus the architecture, so other uses of vLLM are not affected.
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
    """Settings of the pooler, passed as JSON in vLLM's `additional_config`."""

    spec: CaptureSpec
    chunk_rows: int

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values for `additional_config`."""
        fields = {name: getattr(self.spec, name) for name in CaptureSpec.__dataclass_fields__}
        return {"stillhouse": {"spec": fields | {"mode": self.spec.mode.value}, "chunk_rows": self.chunk_rows}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "PoolerSettings":
        """Read the settings from `additional_config`."""
        settings = values["stillhouse"]
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in settings["spec"].items()}
        fields["mode"] = TargetMode(fields["mode"])
        return cls(CaptureSpec(**fields), settings["chunk_rows"])


@dataclass(frozen=True, slots=True)
class _ScheduledTokens:
    """The tokens of one request in a prefill step: rows `start..end` of the step are its tokens `first..`."""

    start: int
    end: int
    first: int
    tokens: int
    """Of the whole prompt."""
    sequence_id: str
    audited: bool


class SignalPooler(Pooler):  # type: ignore[misc]
    """Pooler that reduces the hidden states of a step to packed signal rows."""

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
        """Return the pooling task whose output is one row for each token."""
        return {TASK}

    def get_pooling_updates(self, task: Any) -> PoolingParamsUpdate:
        """Request the prompt's token ids, which are the labels."""
        return PoolingParamsUpdate(requires_token_ids=True)

    def set_hidden_layers(self, hidden: list[Tensor]) -> None:
        """Keep the hidden layers of the current step for `forward`, in ascending order of the layers."""
        self._hidden = hidden

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> list[Tensor | None]:
        """Return the packed rows of every request that this step finishes, None for the others."""
        requests = _scheduled_tokens(pooling_metadata)
        rows = self._reduce(hidden_states, _labels(requests, pooling_metadata), self._uniforms(requests))
        layers, self._hidden = self._layers(hidden_states), []
        if rows is None:  # tensor parallelism: another rank gathers the logits
            return [None] * len(requests)
        return [
            self._pack(request, rows, layers, hidden_states, state.hidden_states_cache)
            for request, state in zip(requests, pooling_metadata.pooling_states, strict=True)
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

    def _uniforms(self, requests: list[_ScheduledTokens]) -> Tensor | None:
        spec = self._settings.spec
        if draws_per_row(spec) == 0:
            return None
        drawn = [row_uniforms(spec, r.sequence_id, r.tokens)[r.first : r.first + r.end - r.start] for r in requests]
        return torch.from_numpy(np.concatenate(drawn))

    def _layers(self, state_RD: Tensor) -> list[Tensor]:
        """Return the spec's layers, in its order."""
        layers = self._settings.spec.hidden_layers
        by_layer = dict(zip(sorted(i for i in layers if i >= 0), self._hidden, strict=False))
        return [state_RD if i == -1 else by_layer[i] for i in layers]

    def _pack(
        self, request: _ScheduledTokens, rows: RowSignals, layers: list[Tensor], state_RD: Tensor, cache: list[Tensor]
    ) -> Tensor | None:
        """Pack the request's rows of this step. Return all of its rows if it is finished, else cache these."""
        finished = request.first + request.end - request.start == request.tokens
        span = slice(request.start, request.end - 1 if finished else request.end)  # the last token has no label
        state_TD = state_RD[span] if request.audited else None
        cache.append(pack_rows(rows[span], [layer[span] for layer in layers], state_TD))
        if not finished:
            return None
        packed = torch.cat(cache)
        cache.clear()
        return packed


def _scheduled_tokens(metadata: PoolingMetadata) -> list[_ScheduledTokens]:
    cursor = metadata.get_pooling_cursor()
    counts = cursor.num_scheduled_tokens_cpu.tolist()
    lengths, totals = cursor.seq_lens_cpu.tolist(), metadata.prompt_lens.tolist()
    requests, start = [], 0
    for count, length, tokens, params in zip(counts, lengths, totals, metadata.pooling_params, strict=True):
        extra = params.extra_kwargs or {}  # None in vLLM's own warm-up
        sequence_id, audited = extra.get("sequence_id", ""), bool(extra.get("audited", False))
        requests.append(_ScheduledTokens(start, start + count, length - count, tokens, sequence_id, audited))
        start += count
    return requests


def _labels(requests: list[_ScheduledTokens], metadata: PoolingMetadata) -> Tensor:
    """Return each row's next token; 0 for a prompt's last token, whose row is dropped."""
    label_R = torch.zeros(requests[-1].end, dtype=torch.long)
    for request, ids in zip(requests, metadata.get_prompt_token_ids_cpu(), strict=True):
        following = ids[request.first + 1 : request.first + 1 + request.end - request.start]
        label_R[request.start : request.start + len(following)] = following
    return label_R


def capture_class(original: type[Any]) -> type[Any]:
    """Return a subclass of the causal LM that is a pooling model with a SignalPooler."""

    class CaptureModel(original):  # type: ignore[misc]
        is_pooling_model = True

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.pooler = SignalPooler(self, vllm_config)
            layers = [i for i in PoolerSettings.from_json(vllm_config.additional_config).spec.hidden_layers if i >= 0]
            if layers:
                self.set_aux_hidden_state_layers(tuple(sorted(layers)))

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            """Run the causal LM's forward pass; pass its hidden layers to the pooler instead of returning them."""
            output = super().forward(*args, **kwargs)
            if isinstance(output, tuple):
                output, hidden = output
                self.pooler.set_hidden_layers(hidden)
            return output

    CaptureModel.__name__ = CaptureModel.__qualname__ = PREFIX + original.__name__
    return CaptureModel


def register() -> None:
    """Register a pooling model for every architecture of vLLM's registry (a vLLM general plug-in)."""
    for architecture in list(ModelRegistry.get_supported_archs()):
        name = PREFIX + architecture
        if not architecture.startswith(PREFIX) and name not in ModelRegistry.models:
            ModelRegistry.register_model(name, f"{__name__}:{name}")


def __getattr__(name: str) -> type[Any]:
    """Build the pooling model's class when vLLM imports it by the name that `register` gave it."""
    architecture = name.removeprefix(PREFIX)
    if name == architecture or architecture not in ModelRegistry.models:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return capture_class(ModelRegistry.models[architecture].load_model_cls())
