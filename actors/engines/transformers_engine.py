"""A teacher in transformers: the reference for vLLM's signals, and the engine where vLLM is not available."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.engines.batching import batches
from actors.engines.checks import check_capture, check_rows, describe_model
from actors.engines.lm_head import read_lm_head
from actors.engines.packing import pack_rows, unpack_rows
from actors.engines.word_starts import word_starts
from actors.signals.reduce import reduce_rows
from actors.signals.rows import concatenate
from actors.signals.sampling import row_uniforms
from pipeline.config.capture import TeacherSpec
from pipeline.contracts import CaptureSpec, LmHead, Signals, TeacherDescription, TokenSequence
from pipeline.errors import EngineDead, ModelError
from pipeline.models.causal_lm import decoder_layers, head_scale_and_cap, hidden_states
from pipeline.models.folders import ModelFolder


class TransformersEngine:
    """A causal LM of transformers in this process. Right-padded batches have at most `max_batched_tokens` tokens."""

    def __init__(self, teacher: TeacherSpec, model: ModelFolder, spec: CaptureSpec) -> None:
        self._teacher, self._folder, self._spec = teacher, model, spec
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._description = describe_model(teacher, model, version("transformers"))
        check_capture(spec, self._description)
        self._model = load_model(teacher, model).to(self._device)
        self._head: Any = self._model.get_output_embeddings()
        self._layers = self._decoder_layers()
        boundary = word_starts(model.path, self._description.vocabulary) if spec.boundary else None
        self._check_head()
        self._boundary_V = None if boundary is None else torch.from_numpy(boundary).to(self._device)

    def describe(self) -> TeacherDescription:
        """Return the description from the model's config."""
        return self._description

    def score(self, sequences: Sequence[TokenSequence]) -> list[Signals]:
        """Return the signals of every sequence, in order. Raises RowError and EngineDead."""
        check_rows(sequences, self._description.vocabulary, self._folder.positions)
        by_index: dict[int, Signals] = {}
        for indices in batches(sequences, self._teacher.max_batched_tokens):
            batch = [sequences[i] for i in indices]
            by_index.update(zip(indices, self._score_batch(batch), strict=True))
        return [by_index[i] for i in range(len(sequences))]

    def lm_head(self) -> LmHead | None:
        """Return the head from the model's files."""
        return read_lm_head(self._folder)

    def close(self) -> None:
        """Delete the model and free its GPU memory."""
        del self._model, self._head
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _score_batch(self, batch: list[TokenSequence]) -> list[Signals]:
        try:
            layers_BND, state_BND = self._forward(batch)
            return [
                self._score_one(sequence, [layer[i] for layer in layers_BND], state_BND[i])
                for i, sequence in enumerate(batch)
            ]
        except (RuntimeError, MemoryError) as error:
            raise EngineDead(f"teacher {self._teacher.name}: transformers: {str(error).splitlines()[0]}") from error

    def _forward(self, batch: list[TokenSequence]) -> tuple[list[Tensor], Tensor]:
        """Return the spec's hidden layers in its order, and the state after the final norm."""
        longest = max(len(sequence.input_ids_N) for sequence in batch)
        ids_BN = torch.zeros(len(batch), longest, dtype=torch.long)
        mask_BN = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, sequence in enumerate(batch):
            ids_BN[row, : len(sequence.input_ids_N)] = torch.from_numpy(sequence.input_ids_N.astype(np.int64))
            mask_BN[row, : len(sequence.input_ids_N)] = 1
        with hidden_states(self._layers, self._spec.hidden_layers) as hidden:
            out = self._model.base_model(
                input_ids=ids_BN.to(self._device), attention_mask=mask_BN.to(self._device), use_cache=False
            )
        state_BND = out.last_hidden_state
        return [state_BND if i == -1 else hidden[i] for i in self._spec.hidden_layers], state_BND

    def _score_one(self, sequence: TokenSequence, layers_ND: list[Tensor], state_ND: Tensor) -> Signals:
        rows = len(sequence.input_ids_N) - 1
        label_T = torch.from_numpy(sequence.input_ids_N[1:].astype(np.int64)).to(self._device)
        uniform_TU = torch.from_numpy(row_uniforms(self._spec, sequence.sequence_id, rows)).to(self._device)
        parts = []
        for start in range(0, rows, self._teacher.chunk_rows):
            chunk = slice(start, min(start + self._teacher.chunk_rows, rows))
            logits = self._logits(state_ND[chunk])
            parts.append(reduce_rows(logits, label_T[chunk], self._spec, uniform_TU[chunk], self._boundary_V))
        state_TD = state_ND[:rows] if sequence.audited else None
        packed = pack_rows(concatenate(parts), [layer[:rows] for layer in layers_ND], state_TD)
        return unpack_rows(packed.cpu().numpy(), self._spec, self._description.hidden_width, sequence)

    def _logits(self, state_RD: Tensor) -> Tensor:
        logits = self._head(state_RD)
        scale, cap = head_scale_and_cap(self._folder.text_config)
        logits = logits if scale == 1.0 else logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _decoder_layers(self) -> torch.nn.ModuleList:
        if (layers := decoder_layers(self._model)) is not None:
            return layers
        name, count = type(self._model).__name__, self._description.layers
        raise ModelError(f"{name}: expected a ModuleList of {count} layers, got none: use engine vllm")

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Raise ModelError if `_logits` of the last hidden state differs from the model's own logits."""
        ids_BN = torch.arange(8, device=self._device)[None] % self._description.vocabulary
        expected = self._model(input_ids=ids_BN, use_cache=False).logits.float()
        got = self._logits(self._model.base_model(input_ids=ids_BN, use_cache=False).last_hidden_state).float()
        if got.shape != expected.shape or not torch.allclose(got, expected, rtol=0.02, atol=0.02):
            raise ModelError(
                f"teacher {self._teacher.name}: {self._description.architecture}: its logits are not its LM head times "
                "its last hidden state, which this engine needs: use engine vllm"
            )


def load_model(teacher: TeacherSpec, model: ModelFolder) -> Any:
    """Load the model in the teacher's dtype, in eval mode. Raises ModelError."""
    from transformers import AutoModelForCausalLM

    if teacher.quantization is not None:
        raise ModelError(f"teacher {teacher.name}: quantization {teacher.quantization} needs engine vllm")
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            str(model.path), dtype=getattr(torch, teacher.dtype), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"teacher {teacher.name}: model {model.path}: cannot be loaded: {reason}") from error
    return loaded.eval()
