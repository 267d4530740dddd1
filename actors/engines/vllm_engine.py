"""A teacher in vLLM: prefill at vLLM's speed, signals through tensors. See `pooler` for what runs inside of it.

vLLM reads its environment when it is imported, so it is imported by the engine's constructor and nowhere else here.
"""

import gc
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from actors.engines.checks import check_capture, check_rows, describe_model
from actors.engines.lm_head import read_lm_head
from actors.engines.packing import unpack_rows
from pipeline.config.capture import TeacherSpec
from pipeline.contracts import CaptureSpec, LmHead, Signals, TeacherDescription, TokenSequence
from pipeline.errors import EngineDead, ModelError
from pipeline.run.gc_paused import gc_paused

if TYPE_CHECKING:
    from pipeline.models.folders import ModelFolder

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: the actor's own death is the engine's, and memory is one
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


class VllmEngine:
    """Hosts a causal LM in this process, and in those that vLLM starts for further ranks."""

    def __init__(self, teacher: TeacherSpec, model: "ModelFolder", spec: CaptureSpec, positions: int | None) -> None:
        self._teacher, self._folder, self._spec = teacher, model, spec
        self._description = describe_model(teacher, model, _vllm_version())
        check_capture(spec, self._description)
        _set_environment(teacher)
        self._llm: Any = self._start(positions)
        self._max_tokens = int(self._llm.model_config.max_model_len)

    def describe(self) -> TeacherDescription:
        """What the model's config says."""
        return self._description

    def score(self, sequences: Sequence[TokenSequence]) -> list[Signals]:
        """Signals of every sequence, in the order asked. Raises RowError, and EngineDead once vLLM has failed."""
        check_rows(sequences, self._description.vocabulary, self._max_tokens)
        outputs = self._encode(sequences)
        return [
            unpack_rows(output.outputs.data.numpy(), self._spec, self._description.hidden_width, sequence)
            for output, sequence in zip(outputs, sequences, strict=True)
        ]

    def lm_head(self) -> LmHead | None:
        """The head as the model's files hold it; None where vLLM quantises it."""
        return None if self._teacher.quantization else read_lm_head(self._folder)

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm

    def _encode(self, sequences: Sequence[TokenSequence]) -> list[Any]:
        from vllm import PoolingParams, TokensPrompt

        from actors.engines.pooler import TASK

        prompts = [TokensPrompt(prompt_token_ids=sequence.input_ids_N.tolist()) for sequence in sequences]
        params = [
            PoolingParams(task=TASK, extra_kwargs={"sequence_id": s.sequence_id, "audited": s.audited})
            for s in sequences
        ]
        try:
            outputs: list[Any] = self._llm.encode(prompts, params, pooling_task=TASK, use_tqdm=False)
        except Exception as error:  # whatever it was, requests of this call are left inside the engine
            raise EngineDead(f"teacher {self._teacher.name}: vllm: {_one_line(error)}") from error
        return outputs

    def _start(self, positions: int | None) -> Any:
        _import_vllm(self._teacher)
        pooling = _pooling_arguments(self._teacher, self._spec, self._register())
        arguments = engine_arguments(self._teacher, self._folder, positions, on_cpu=_on_cpu())
        return _start_llm(self._teacher, arguments | pooling)

    def _register(self) -> str:
        """Make the capture class known in this process, and its name. Raises ModelError."""
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
        from vllm.model_executor.models.registry import ModelRegistry

        from actors.engines.pooler import PREFIX, capture_class, register

        architecture = self._description.architecture
        if architecture not in ModelRegistry.models:
            raise ModelError(
                f"teacher {self._teacher.name}: vllm does not serve {architecture}: use engine transformers"
            )
        original = ModelRegistry.models[architecture].load_model_cls()
        asked = [i for i in self._spec.hidden_layers if i >= 0]
        if asked and not getattr(original, "supports_eagle3", False):
            raise ModelError(
                f"teacher {self._teacher.name}: vllm's {architecture} gives no hidden layers but -1, got {asked}: "
                "ask for -1 alone, or use engine transformers"
            )
        name = PREFIX + architecture
        ModelRegistry.register_model(name, capture_class(original))
        if architecture in MODELS_CONFIG_MAP:
            MODELS_CONFIG_MAP[name] = MODELS_CONFIG_MAP[architecture]
        register()
        return name


def open_generator(teacher: TeacherSpec, model: "ModelFolder", positions: int | None) -> Any:
    """vLLM's own engine, for prompts and answers of that many tokens together.

    Raises ModelError, and EngineDead where it does not start.
    """
    _set_environment(teacher)
    _import_vllm(teacher)
    arguments = engine_arguments(teacher, model, positions, on_cpu=_on_cpu())
    return _start_llm(teacher, arguments | {"runner": "generate"})


def _import_vllm(teacher: TeacherSpec) -> None:
    """Raises ModelError."""
    try:
        with gc_paused():
            from vllm import LLM  # noqa: F401
    except ImportError as error:
        raise _not_installed(teacher, error) from error
    gc.freeze()  # vLLM's start, which follows, collects five times, and would go through all that was imported


def _set_environment(teacher: TeacherSpec) -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if teacher.ranks > 1:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", _cores_by_rank(teacher.ranks))
        # vLLM asks for a whole GPU a rank unless told: in a bundle that holds less it would wait for ever.
        os.environ["VLLM_RAY_PER_WORKER_GPUS"] = f"{teacher.gpu_fraction:g}"


def _start_llm(teacher: TeacherSpec, arguments: dict[str, Any]) -> Any:
    import vllm

    try:
        return vllm.LLM(**arguments)
    except Exception as error:
        raise EngineDead(f"teacher {teacher.name}: vllm did not start: {_one_line(error)}") from error


def _pooling_arguments(teacher: TeacherSpec, spec: CaptureSpec, architecture: str) -> dict[str, Any]:
    from actors.engines.pooler import PoolerSettings

    return {
        "runner": "pooling",
        # Without this a pooling model's head runs in float32, by a cast of the whole matrix on every call.
        "hf_overrides": {"architectures": [architecture], "head_dtype": "model"},
        "additional_config": PoolerSettings(spec, teacher.chunk_rows).to_json(),
    }


def engine_arguments(
    teacher: TeacherSpec, model: "ModelFolder", positions: int | None, *, on_cpu: bool
) -> dict[str, Any]:
    """What vLLM is told, whatever it is used for.

    `positions` is the longest sequence that it will see: it must have room for the keys and values of one such
    sequence, and would otherwise ask for room for the longest that the model can read.
    """
    arguments: dict[str, Any] = {
        "model": str(model.path),
        "trust_remote_code": False,
        "dtype": teacher.dtype,
        "quantization": teacher.quantization,
        "tensor_parallel_size": teacher.tensor_parallel,
        "pipeline_parallel_size": teacher.pipeline_parallel,
        "distributed_executor_backend": _executor(teacher, on_cpu=on_cpu),
        "max_model_len": None if positions is None else min(positions, model.positions or positions),
        "max_num_batched_tokens": teacher.max_batched_tokens,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": False,  # it returned wrong scores for prompts in the past
        "disable_log_stats": True,
        "seed": 0,
    }
    if on_cpu:
        return arguments | {"enforce_eager": True, "kv_cache_memory_bytes": int(teacher.kv_cache_gib * 2**30)}
    # The share is of a whole GPU: replicas that take a part of one each must not take the others' memory.
    return arguments | {"gpu_memory_utilization": teacher.gpu_memory_share * teacher.gpu_fraction}


def _executor(teacher: TeacherSpec, *, on_cpu: bool) -> str:
    """Further ranks on GPUs are Ray actors in the replica's placement group; on a CPU they are its child processes."""
    if teacher.ranks == 1:
        return "uni"
    return "mp" if on_cpu else "ray"


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _cores_by_rank(ranks: int) -> str:
    """The cores of the process, dealt out to the ranks of a CPU teacher; `auto` where there are fewer than ranks."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < ranks:
        return "auto"
    return "|".join(",".join(map(str, cores[rank::ranks])) for rank in range(ranks))


def _vllm_version() -> str:
    """Of whichever build is installed; `vllm-cpu` is vLLM's own name for its CPU build."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"


def _not_installed(teacher: TeacherSpec, error: ImportError) -> ModelError:
    return ModelError(
        f"teacher {teacher.name}: vllm cannot be imported: {_one_line(error)}; run: make install, or use engine "
        "transformers"
    )


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
