"""The table that a run ends with."""

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
    """The report's results as text: one row a model, and what was recovered of the teacher-control gap."""
    return "\n".join(line for name, one in report["students"].items() for line in _lines(name, one))


def _lines(name: str, one: dict[str, Any]) -> Iterator[str]:
    held_out = one["held_out"]
    yield f"{name}, on {held_out['labels']:,} held-out tokens ({held_out['bytes']:,} bytes)"
    yield " " * 10 + "".join(f"{title:>17}" for title in _COLUMNS)
    for arm, measures in one["results"].items():
        cells = (f"{measures[key]:>17{form}}" for key, form in _COLUMNS.values())
        yield f"{arm:<10}" + "".join(cells)
    if one["recovered"] is not None:
        kl = "" if one["recovered_kl"] is None else f", {one['recovered_kl']:.1%} in KL"
        yield f"recovered of the gap between control and teacher: {one['recovered']:.1%} in bits per byte{kl}"
