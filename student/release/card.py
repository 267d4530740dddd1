"""Model card of an exported student: teachers, training, held-out results."""

from collections.abc import Iterator
from typing import Any


def model_card(provenance: dict[str, Any]) -> str:
    """README.md with the Hub's metadata. States no licence of the student, but those of the teachers where known."""
    return "\n".join(_lines(provenance)) + "\n"


def _lines(provenance: dict[str, Any]) -> Iterator[str]:
    recipe, teachers, training = provenance["recipe"], provenance["teachers"], provenance["training"]
    yield from (
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [distillation, stillhouse]",
    )
    yield from ("---", "", f"# {recipe['name']}: {provenance['student']}", "")
    version = provenance["versions"].get("stillhouse", "")
    yield f"Distilled with stillhouse {version} from the cached signals of these teachers:"
    yield ""
    for teacher in teachers:
        licence = teacher["licence"] or "see its own card"
        at = f" at {teacher['revision']}" if teacher["revision"] else ""
        yield f"- {teacher['name']}: `{teacher['model']}`{at}, {teacher['architecture']}; licence: {licence}"
    yield from ("", "Whoever publishes this model states its licence, in keeping with the teachers' licences.", "")
    yield from ("## Training", "")
    yield f"{training['steps']:,} steps, {training['tokens']:,} tokens, {training['seconds']:,} s."
    if provenance["results"]:
        yield from ("", "## Held-out results", "", *_results(provenance["results"]))
    yield from (
        "",
        "`provenance.json` has the full recipe, fingerprints, package versions and the sha256 of every file.",
    )


def _results(results: dict[str, dict[str, float]]) -> Iterator[str]:
    yield "| model | bits per byte | KL to teacher | top-1 agreement |"
    yield "|---|---|---|---|"
    for arm, measures in results.items():
        values = (measures[key] for key in ("bits_per_byte", "kl_to_teacher", "top1_agreement"))
        yield f"| {arm} | {' | '.join(f'{value:.4f}' for value in values)} |"
