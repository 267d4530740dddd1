"""What every engine refuses, in the same words."""

from collections.abc import Sequence

from pipeline.contracts import CaptureSpec, TeacherDescription, TokenSequence
from pipeline.errors import RecipeError, RowError


def check_capture(spec: CaptureSpec, teacher: TeacherDescription) -> None:
    """Raise RecipeError where the spec asks for more entries or other layers than the teacher has."""
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
    """Raise RowError for the first sequence that no engine of this teacher could score."""
    for sequence in sequences:
        ids = sequence.input_ids_N
        if len(ids) < 2:
            raise RowError(sequence.sequence_id, f"expected at least 2 tokens, got {len(ids)}")
        if max_tokens is not None and len(ids) > max_tokens:
            raise RowError(sequence.sequence_id, f"expected at most {max_tokens} tokens, got {len(ids)}")
        if ids.min() < 0 or ids.max() >= vocabulary:
            wrong = ids[(ids < 0) | (ids >= vocabulary)][0]
            raise RowError(sequence.sequence_id, f"expected token ids in 0..{vocabulary - 1}, got {wrong}")
