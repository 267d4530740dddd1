"""Report of the records as Markdown: device, table, goals, tests, and what was not measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu.records import Record, is_met

BEGIN, END = "<!-- bench-gpu: begin -->", "<!-- bench-gpu: end -->"
_UNITS = {"B/s": (1e9, "GB/s"), "FLOP/s": (1e12, "TFLOP/s")}


def report(found: Record) -> str:
    """Return the report of a run."""
    records = found["records"]
    sections = [_about(found["about"]), _table(records), _goals(records, found["about"]["sizes"]), _tests(records)]
    return "\n\n".join(section for section in [*sections, _not_measured(found)] if section) + "\n"


def write_between_marks(readme: Path, text: str) -> None:
    """Replace the text between the two marks. Raises ValueError if the file has no such marks."""
    before, begin, rest = readme.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{readme}: expected the lines {BEGIN} and {END}, got none; add them where the table belongs")
    readme.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", "utf-8")


def _about(about: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    sizes = "" if about["sizes"] == "full" else " Tiny sizes on a CPU: the speeds mean nothing."
    return f"{about['date']}, {about.get('device', 'unknown device')}, commit {about['commit']}; {versions}.{sizes}"


def _table(records: Sequence[Record]) -> str:
    lines = ["| part | case | variant | ms | rate | ratio | peak MiB | |", "|---|---|---|--:|--:|--:|--:|---|"]
    part = case = ""
    for record in (record for record in records if record["kind"] == "figure"):
        names = [record["part"] if record["part"] != part else "", record["case"]]
        if not names[0] and record["case"] == case:
            names[1] = ""
        part, case = record["part"], record["case"]
        lines.append("| " + " | ".join([*names, record["variant"], *_numbers(record), record["note"] or ""]) + " |")
    return "\n".join(lines)


def _numbers(record: Record) -> list[str]:
    ratio = "" if record["ratio"] is None else f"{record['ratio']:.2f} of {record['to']}"
    peak = "" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 2**20:,.0f}"
    ms = "" if record["ms"] is None else f"{record['ms']:,.3g}" if record["ms"] < 100 else f"{record['ms']:,.0f}"
    return [ms, _rate(record["rate"], record["unit"]), ratio, peak]


def _rate(rate: float | None, unit: Any) -> str:
    if rate is None:
        return ""
    scale, name = _UNITS.get(unit, (1, unit))
    return f"{rate / scale:,.0f} {name}"


def _goals(records: Sequence[Record], sizes: str) -> str:
    """Return each goal as met or missed; at tiny sizes, time and memory are not judged."""
    lines = ["Goals:", ""]
    for goal in (record for record in records if record["kind"] == "goal"):
        bound = f"at least {goal['at_least']:g}" if goal["at_least"] is not None else f"at most {goal['at_most']:g}"
        verdict = "met" if is_met(goal) else "**missed**"
        verdict = verdict if sizes == "full" or goal["is_numerical"] else "not judged"
        note = f" ({goal['note']})" if goal["note"] else ""
        lines.append(f"- {verdict}: {goal['quantity']}, {goal['case']}: {goal['value']:.3g}, {bound}{note}")
    return "\n".join(lines) if len(lines) > 2 else ""


def _tests(records: Sequence[Record]) -> str:
    tests = [record for record in records if record["kind"] == "test"]
    if not tests:
        return ""
    lines = ["Tests:", ""]
    for test in tests:
        message = f": {test['message']}" if test["message"] else ""
        lines.append(f"- {test['outcome']} in {test['seconds']:.1f} s: `{test['name']}`{message}")
    return "\n".join(lines)


def _not_measured(found: Record) -> str:
    lines = ["Not measured:", ""]
    lines += [f"- package not installed: {name}" for name in found["about"].get("missing_packages", [])]
    lines += [f"- {name}: {part['state']}" for name, part in found["parts"].items() if part["state"] != "done"]
    failures = (record for record in found["records"] if record["kind"] == "failure")
    lines += [f"- {failure['part']}, {failure['case']}: {failure['message']}" for failure in failures]
    return "\n".join(lines) if len(lines) > 2 else ""
