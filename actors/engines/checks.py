"""Description and checks that all engines share: model config, capture spec, sequences."""

from collections.abc import Sequence

from pipeline.config.capture import TeacherSpec
from pipeline.contracts import CaptureSpec, TeacherDescription, TokenSequence
from pipeline.errors import ModelError, RecipeError, RowError
from pipeline.models.folders import ModelFolder

_SIZES = ("vocab_size", "num_hidden_layers", "hidden_size")


def describe_model(teacher: TeacherSpec, model: ModelFolder, engine_version: str) -> TeacherDescription:
    """Return the description from `config.json`. Raises ModelError if a size or the architecture is missing."""
    config = model.text_config
    sizes = {name: config.get(name) for name in _SIZES}
    aliases = {"num_hidden_layers": "n_layer", "hidden_size": "n_embd"}
    for name, alias in aliases.items():
        sizes[name] = sizes[name] or config.get(alias)
    architecture = (model.config.get("architectures") or [None])[0]
    if architecture is None or not all(isinstance(size, int) for size in sizes.values()):
        missing = [name for name in _SIZES if not isinstance(sizes[name], int)] or ["architectures"]
        raise ModelError(f"model {model.path}: config.json: expected {', '.join(missing)}, got none")
    return TeacherDescription(
        name=teacher.name,
        architecture=architecture,
        vocabulary=int(sizes["vocab_size"] or 0),
        layers=int(sizes["num_hidden_layers"] or 0),
        hidden_width=int(sizes["hidden_size"] or 0),
        dtype=teacher.dtype,
        engine=teacher.engine,
        engine_version=engine_version,
        extra={} if teacher.quantization is None else {"quantization": teacher.quantization},
    )


def check_capture(spec: CaptureSpec, teacher: TeacherDescription) -> None:
    """Raise RecipeError if the spec asks for more entries than the vocabulary or for layers that do not exist."""
    if not 1 <= spec.k < teacher.vocabulary:
        raise RecipeError(
            f"recipe capture.k: expected 1..V-1 (V={teacher.vocabulary} of teacher {teacher.name}), got {spec.k}"
        )
    for layer in spec.hidden_layers:
        if not -1 <= layer <= teacher.layers:
            raise RecipeError(
                f"recipe capture.hidden_layers: expected 0..{teacher.layers} or -1 "
                f"({teacher.layers} layers in teacher {teacher.name}), got {layer}"
            )


def check_rows(sequences: Sequence[TokenSequence], vocabulary: int, max_tokens: int | None) -> None:
    """Raise RowError for the first sequence whose length or token ids the teacher cannot process."""
    for sequence in sequences:
        ids = sequence.input_ids_N
        if len(ids) < 2:
            raise RowError(sequence.sequence_id, f"expected at least 2 tokens, got {len(ids)}")
        if max_tokens is not None and len(ids) > max_tokens:
            raise RowError(sequence.sequence_id, f"expected at most {max_tokens} tokens, got {len(ids)}")
        if ids.min() < 0 or ids.max() >= vocabulary:
            wrong = ids[(ids < 0) | (ids >= vocabulary)][0]
            raise RowError(sequence.sequence_id, f"expected token ids in 0..{vocabulary - 1}, got {wrong}")
