"""Engines that host a teacher: three implementations of `pipeline.contracts.Engine`."""

from pipeline.config.capture import TeacherSpec
from pipeline.contracts import CaptureSpec, Engine
from pipeline.errors import ModelError
from pipeline.models.dtype import resolve_dtype
from pipeline.models.folders import ModelFolder
from pipeline.run.gc_paused import gc_paused


def open_engine(
    teacher: TeacherSpec, model: ModelFolder | None, spec: CaptureSpec, positions: int | None = None
) -> Engine:
    """Load the teacher in this process and return the engine that `teacher.engine` names, ready to score.

    `model` may be None for the dummy engine only. `positions` is the length of the longest sequence in tokens; None
    stands for the model's own limit. Raises ModelError (no model, or one that the engine does not support),
    RecipeError (the spec asks for signals that this teacher does not have) and EngineDead (the engine did not start).
    """
    if teacher.engine == "dummy":
        from actors.engines.dummy import DummyEngine

        return DummyEngine(teacher, model, spec)
    if model is None:
        raise ModelError(f"teacher {teacher.name}: engine {teacher.engine}: expected a model folder, got none")
    teacher = resolve_dtype(teacher)
    if teacher.engine == "transformers":
        with gc_paused():
            from actors.engines.transformers_engine import TransformersEngine

        return TransformersEngine(teacher, model, spec)
    from actors.engines.vllm_engine import VllmEngine

    return VllmEngine(teacher, model, spec, positions)
