"""Text table of an evaluation report."""

from collections.abc import Iterator
from typing import Any

_COLUMNS = {
    "bits per byte": ("bits_per_byte", ".4f"),
    "KL to teacher": ("kl_to_teacher", ".4f"),
    "top-1 agreement": ("top1_agreement", ".3f"),
    "acceptance": ("acceptance", ".3f"),
    "ECE": ("calibration_error", ".3f"),
}


def format_table(report: dict[str, Any]) -> str:
    """One row per model and metric columns, for every student, and the recovered share of the teacher-control gap."""
    return "\n".join(line for name, student in report["students"].items() for line in _lines(name, student))


def _lines(name: str, student: dict[str, Any]) -> Iterator[str]:
    held_out = student["held_out"]
    yield f"{name}, on {held_out['labels']:,} held-out tokens ({held_out['bytes']:,} bytes)"
    yield " " * 10 + "".join(f"{title:>17}" for title in _COLUMNS)
    for arm, metrics in student["results"].items():
        cells = (f"{metrics[key]:>17{form}}" for key, form in _COLUMNS.values())
        yield f"{arm:<10}" + "".join(cells)
    if student["recovered"] is not None:
        kl = "" if student["recovered_kl"] is None else f", {student['recovered_kl']:.1%} in KL"
        yield f"recovered of the gap between control and teacher: {student['recovered']:.1%} in bits per byte{kl}"
