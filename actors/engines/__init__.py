"""The engines that host a teacher: one protocol (`pipeline.contracts.Engine`), three ways to keep it."""

from typing import TYPE_CHECKING

from pipeline.config.capture import TeacherSpec
from pipeline.contracts import CaptureSpec, Engine
from pipeline.errors import ModelError
from pipeline.models.dtype import resolve_dtype
from pipeline.run.gc_paused import gc_paused

if TYPE_CHECKING:
    from pipeline.models.folders import ModelFolder


def open_engine(
    teacher: TeacherSpec, model: "ModelFolder | None", spec: CaptureSpec, positions: int | None = None
) -> Engine:
    """Host the teacher in this process and return its engine, ready to score.

    `model` may be None for the dummy engine alone. `positions` is the length of the longest sequence that it will be
    asked about; unset, as long as the model can read. Raises ModelError (no model, or one that the engine cannot
    serve), RecipeError (the spec asks for what this teacher cannot give) and EngineDead (it did not start).
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
