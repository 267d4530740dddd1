"""Asked before a training starts: may these caches be trained from, and does the recipe fit them."""

from collections.abc import Sequence

from pipeline.cache.admission import admit
from pipeline.cache.reader import CacheReader
from pipeline.errors import AdmissionError
from pipeline.model_store import resolve_model
from student.job import Told
from student.losses import check_supported
from student.setup import make_order
from student.stream import Rows


def check_before(told: Told, caches: Sequence[CacheReader]) -> None:
    """Raise AdmissionError or RecipeError where the training could not go well. Builds no model."""
    training = told.recipe.training
    tokenizer, vocabulary = _tokenizer(told, caches), _vocabulary(told, caches)
    for cache in caches:
        floor = training.min_captured_mass if told.arm == "student" else 0.0
        admit(cache, tokenizer_digest=tokenizer, vocabulary=vocabulary, min_captured_mass=floor)
        if told.arm == "student":
            check_supported(training.distribution, cache.spec.capture)
    make_order(told, Rows(caches, "train"))


def _tokenizer(told: Told, caches: Sequence[CacheReader]) -> str:
    """The student's tokenizer: a checkpoint's own, otherwise that of the teacher that it comes from, or the first's."""
    spec = told.spec
    if spec.checkpoint is not None:
        return resolve_model(spec.checkpoint, revision=spec.revision).tokenizer_digest
    names = [teacher.name for teacher in told.recipe.teachers]
    return str(caches[names.index(spec.from_teacher or names[0])].identity.fields["tokenizer"])


def _vocabulary(told: Told, caches: Sequence[CacheReader]) -> int | None:
    """Tokens of a student that is built from a config. Checkpoints of one tokenizer may be padded to any width."""
    if told.spec.config is None:
        return None
    vocabulary = told.spec.config.get("vocab_size", caches[0].spec.vocabulary)
    if not isinstance(vocabulary, int):
        raise AdmissionError(f"student.config.vocab_size: expected a number, got {vocabulary!r}")
    return vocabulary
