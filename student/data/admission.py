"""Checks before a training starts: the caches are usable, and match the recipe and the student."""

from collections.abc import Sequence

from pipeline.cache.reader import CacheReader
from pipeline.cache.verify.admission import admit
from pipeline.errors import AdmissionError
from pipeline.models.folders import resolve_model
from pipeline.models.tokenizers import load_tokenizer
from student.data.dataset import make_batch_sampler, make_dataset
from student.data.fusion import check_fusion
from student.losses.registry import check_supported
from student.tracking.trackers import check_trackers
from student.training_job import TrainingJob


def check_training_job(job: TrainingJob, caches: Sequence[CacheReader]) -> None:
    """Raise AdmissionError or RecipeError if caches, recipe and student do not match. Builds no model."""
    training = job.recipe.training
    check_trackers(training.trackers)
    tokenizer, vocabulary = _tokenizer(job, caches), _vocabulary(job, caches)
    for cache in caches:
        min_mass = training.min_captured_mass if job.arm == "student" else 0.0
        admit(cache, tokenizer_digest=tokenizer, vocabulary=vocabulary, min_captured_mass=min_mass)
        if job.arm == "student":
            check_supported(training.distribution, cache.spec.capture)
    if (reference := job.reference()) is not None:
        admit(reference, tokenizer_digest=tokenizer)
    _check_width(job)
    if job.arm == "student":
        _check_fusion(job, caches)
    make_batch_sampler(job, make_dataset(job, caches))


def _tokenizer(job: TrainingJob, caches: Sequence[CacheReader]) -> str:
    """Digest of the student's tokenizer: the checkpoint's, else `from_teacher`'s, else that of the first cache."""
    spec = job.spec
    if spec.checkpoint is not None:
        return resolve_model(spec.checkpoint, revision=spec.revision).tokenizer_digest
    if spec.from_teacher is None:
        return str(caches[0].identity.fields["tokenizer"])
    return str(CacheReader.open(job.recipe.cache_uri(spec.from_teacher)).identity.fields["tokenizer"])


def _vocabulary(job: TrainingJob, caches: Sequence[CacheReader]) -> int | None:
    """Vocabulary of a student built from a config; None for one with weights, whose LM head may be padded."""
    if job.spec.config is None:
        return None
    vocabulary = job.spec.config.get("vocab_size", caches[0].spec.vocabulary)
    if not isinstance(vocabulary, int):
        raise AdmissionError(f"student.config.vocab_size: expected a number, got {vocabulary!r}")
    return vocabulary


def _check_width(job: TrainingJob) -> None:
    """Raise AdmissionError if the student's initial LM head has fewer rows than its tokenizer has ids."""
    spec = job.spec
    if spec.config is not None:
        return
    reference, revision = spec.checkpoint, spec.revision
    if reference is None:
        teacher = job.recipe.teacher_by_name(spec.from_teacher or "")
        reference, revision = teacher.model, teacher.revision
    model = resolve_model(reference, revision=revision)
    width, tokens = model.text_config.get("vocab_size"), load_tokenizer(model.path).size
    if isinstance(width, int) and width < tokens:
        raise AdmissionError(
            f"student {job.student}: {reference} has a vocabulary of {width}, expected at least the {tokens} ids of "
            "its tokenizer; resize its embeddings"
        )


def _check_fusion(job: TrainingJob, caches: Sequence[CacheReader]) -> None:
    fusion = job.recipe.training.fusion
    by_domain = fusion.how == "route" or any(":" in key for key in fusion.weights)
    domains = caches[0].units.domains("train") if by_domain and len(caches) > 1 else {None}
    modes = {
        teacher.name: cache.spec.capture.mode
        for teacher, cache in zip(job.recipe.training_teachers, caches, strict=True)
    }
    check_fusion(fusion, modes, domains)
