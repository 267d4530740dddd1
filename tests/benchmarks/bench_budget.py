"""Measures which share of the control's training tokens a distilled student needs to reach the control's loss and KL.

Captures once. Then, for each seed, trains the control on all tokens and students on shares of the tokens. Each training
is complete: its learning-rate schedule ends at its last token.

    python tests/benchmarks/bench_budget.py [--recipe quickstart] [--shares 0.1 0.25 0.5 1] [--seeds 21 1]

prints the curve and writes build/bench-budget.json: one record for each seed and share, and the shares needed. The same
command resumes an interrupted benchmark. Exit code 1 if a student needs more than half of the tokens.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

GOAL = 0.5


def main() -> int:
    """Train what is missing, print the curve, write the records. Return 1 if the goal is missed."""
    arguments = _arguments()
    records = [record for seed in arguments.seeds for record in curve(seed, arguments)]
    of_seed = {seed: [record for record in records if record["seed"] == seed] for seed in arguments.seeds}
    needed = {seed: share_needed(of_one) for seed, of_one in of_seed.items()}
    for_kl = {seed: share_needed(of_one, "kl_to_teacher") for seed, of_one in of_seed.items()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    shares = [{"seed": n, "share_needed": share, "share_needed_for_kl": for_kl[n]} for n, share in needed.items()]
    arguments.out.write_text(json.dumps([*records, *shares], indent=1) + "\n")
    print("\n".join(table(records)))
    for seed, share in needed.items():
        loss, kl = ("more than all" if part is None else f"{part:.0%}" for part in (share, for_kl[seed]))
        print(f"seed {seed}: share of the control's tokens for its final loss: {loss}, for its final KL: {kl}")
    return int(any(share is None or share > GOAL for share in needed.values()))


def curve(seed: int, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train the control and the students of one seed; yield their records."""
    full = train_student(arguments, f"seed-{seed}", [f"student.seed={seed}", "evaluation.control=ce"])
    yield {"seed": seed, "arm": "control", "share": 1.0, **full["control"]}
    for share in sorted(arguments.shares):
        if share == 1.0:
            yield {"seed": seed, "arm": "student", "share": share, **full["student"]}
            continue
        steps = round(share * full["steps"])
        settings = [f"student.seed={seed}", f"training.max_steps={steps}", "evaluation.control=none"]
        result = train_student(arguments, f"seed-{seed}-steps-{steps}", settings)
        yield {"seed": seed, "arm": "student", "share": steps / full["steps"], **result["student"]}


def train_student(arguments: argparse.Namespace, name: str, settings: Sequence[str]) -> dict[str, Any]:
    """Train and evaluate a student (and its control); return their results and the number of steps."""
    storage = arguments.out.parent / "budget"
    recipe = [arguments.recipe, f"storage={storage}", f"student.name={name}", "training.workers=0", *settings]
    for verb in ("capture", "train", "evaluate"):
        subprocess.run([sys.executable, "-m", "pipeline.run.cli", verb, *recipe], check=True)
    results = json.loads((storage / "report.json").read_text())["results"]
    steps = json.loads((storage / "students" / name / "train.json").read_text())["steps"]
    return {"student": results["student"], "control": results.get("control"), "steps": steps}


def share_needed(records: Sequence[dict[str, Any]], measure: str = "bits_per_byte") -> float | None:
    """Return the share at which the students' curve reaches the control's value, by linear interpolation.

    The smallest measured share if that student already reaches it; None if no student does.
    """
    control = next(record[measure] for record in records if record["arm"] == "control")
    points = [(record["share"], record[measure]) for record in records if record["arm"] == "student"]
    previous: tuple[float, float] | None = None
    for share, value in points:
        if value <= control:
            if previous is None:
                return float(share)
            part = (previous[1] - control) / (previous[1] - value)
            return float(previous[0] + part * (share - previous[0]))
        previous = share, value
    return None


def table(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the records as a Markdown table."""
    yield "| seed | arm | share of the tokens | bits per byte | KL to teacher | top-1 |"
    yield "|--:|---|--:|--:|--:|--:|"
    for record in records:
        yield (
            f"| {record['seed']} | {record['arm']} | {record['share']:.2f} | {record['bits_per_byte']:.4f} "
            f"| {record['kl_to_teacher']:.3f} | {record['top1_agreement']:.3f} |"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.25, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[21, 1])
    parser.add_argument("--out", type=Path, default=Path("build/bench-budget.json"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
