"""Engines that generate a teacher's answers to prompts: dummy, transformers and vLLM.

An answer depends on the model, the prompt, the recipe's `sampling` and the seed of the prompt; not on the other prompts
of its batch, as far as the engine's arithmetic allows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pipeline.config.capture import SamplingSpec, TeacherSpec
from pipeline.contracts import Completion, IntArray
from pipeline.errors import EngineDead, ModelError
from pipeline.models.dtype import resolve_dtype
from pipeline.models.folders import ModelFolder


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to continue, with the seed of the sampling and the most tokens of the answer."""

    sequence_id: str
    """Its name in errors and in quarantine/."""
    input_ids_N: IntArray
    seed: int
    max_tokens: int


class Generator(Protocol):
    """A hosted teacher that generates answers."""

    def generate(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """One completion per prompt, in order, without the end-of-turn token. Raises RowError and EngineDead."""

    def close(self) -> None:
        """Free the memory of the engine and end its worker processes."""


def open_generator(
    teacher: TeacherSpec, sampling: SamplingSpec, model: ModelFolder | None, positions: int | None = None
) -> Generator:
    """Host the teacher in this process, ready to generate. `positions`: tokens of the longest prompt and its answer.

    Raises ModelError and EngineDead.
    """
    if teacher.engine == "dummy":
        return DummyGenerator(teacher)
    if model is None:
        raise ModelError(f"teacher {teacher.name}: engine {teacher.engine}: expected a model folder, got none")
    teacher = resolve_dtype(teacher)
    if teacher.engine == "transformers":
        return TransformersGenerator(teacher, sampling, model)
    return VllmGenerator(teacher, sampling, model, positions)


class DummyGenerator:
    """Generates letters as a function of the prompt and its seed. Half of them end early. See `engines.dummy`."""

    def __init__(self, teacher: TeacherSpec) -> None:
        from actors.engines.dummy import Faults

        self._faults = Faults(teacher.options)
        self._faults.open()

    def generate(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """See Generator."""
        self._faults.inject([prompt.sequence_id for prompt in prompts])
        self._faults.delay(sum(prompt.max_tokens for prompt in prompts))
        return [self._answer(prompt) for prompt in prompts]

    def close(self) -> None:
        """Nothing is held."""

    def _answer(self, prompt: Prompt) -> Completion:
        draw = np.random.Generator(np.random.Philox(key=prompt.seed ^ int(prompt.input_ids_N.sum())))
        finished = bool(draw.integers(2)) and prompt.max_tokens > 1
        letters = draw.integers(97, 123, prompt.max_tokens - finished).astype(np.int32)
        return Completion(np.concatenate([prompt.input_ids_N, letters]), len(prompt.input_ids_N), finished)


class TransformersGenerator:
    """`generate` of transformers, one prompt at a time."""

    def __init__(self, teacher: TeacherSpec, sampling: SamplingSpec, model: ModelFolder) -> None:
        import torch

        from actors.engines.transformers_engine import load_model

        self._torch, self._name, self._sampling = torch, teacher.name, sampling
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = load_model(teacher, model).to(self._device)

    def generate(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """See Generator."""
        try:
            with self._torch.inference_mode():
                return [self._answer(prompt) for prompt in prompts]
        except (RuntimeError, MemoryError) as error:
            raise EngineDead(f"teacher {self._name}: transformers: {str(error).splitlines()[0]}") from error

    def close(self) -> None:
        """See Generator."""
        del self._model

    def _answer(self, prompt: Prompt) -> Completion:
        self._torch.manual_seed(prompt.seed)
        ids_BN = self._torch.from_numpy(prompt.input_ids_N.astype(np.int64))[None].to(self._device)
        sampled = {
            "do_sample": True,
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "top_k": 0,
        }
        out_BN = self._model.generate(
            ids_BN,
            attention_mask=self._torch.ones_like(ids_BN),
            max_new_tokens=prompt.max_tokens,
            **(sampled if self._sampling.temperature > 0 else {"do_sample": False}),
        )
        ids_N = out_BN[0].cpu().numpy().astype(np.int32)
        finished = bool(np.isin(ids_N[-1], self._model.generation_config.eos_token_id))
        return Completion(ids_N[:-1] if finished else ids_N, len(prompt.input_ids_N), finished)


class VllmGenerator:
    """vLLM's generation: continuous batching and its sampler."""

    def __init__(self, teacher: TeacherSpec, sampling: SamplingSpec, model: ModelFolder, positions: int | None) -> None:
        from actors.engines.vllm_engine import open_generator as start_vllm

        self._name, self._sampling = teacher.name, sampling
        self._llm: Any = start_vllm(teacher, model, positions)

    def generate(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """See Generator."""
        from vllm import TokensPrompt

        inputs = [TokensPrompt(prompt_token_ids=prompt.input_ids_N.tolist()) for prompt in prompts]
        try:
            outputs = self._llm.generate(inputs, [self._parameters(prompt) for prompt in prompts], use_tqdm=False)
        except Exception as error:
            raise EngineDead(f"teacher {self._name}: vllm: {' '.join(str(error).split())[:300]}") from error
        return [_completion(prompt, output.outputs[0]) for prompt, output in zip(prompts, outputs, strict=True)]

    def close(self) -> None:
        """See Generator."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm

    def _parameters(self, prompt: Prompt) -> Any:
        from vllm import SamplingParams

        sampling = self._sampling
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=prompt.max_tokens,
            seed=prompt.seed,
            detokenize=False,
        )


def _completion(prompt: Prompt, output: Any) -> Completion:
    """Without the token that ended the turn, which vLLM keeps."""
    finished = output.finish_reason == "stop"
    answer = list(output.token_ids)[: -1 if finished else None]
    return Completion(
        np.concatenate([prompt.input_ids_N, np.array(answer, np.int32)]), len(prompt.input_ids_N), finished
    )
