"""Measures what capture and training cost on a GPU, with one command of at most eight minutes.

    device      name, versions, memory bandwidth and matrix product
    tests       the tests that are skipped without a GPU
    reduction   logits to signals, compared with torch.topk and torch.logsumexp and with the memory bandwidth
    capture     the transformers engine and the encoding of shards, compared with bare prefill
    head        the student's LM head and loss, compared with plain cross-entropy and a dense loss
    liger       Liger's fused loss in the same shapes
    training    a step of a 1B student with KD, compared with one with cross-entropy; also under FSDP2
    compiled    the same step under torch.compile
    decode      from shards to tensors on the device

Every part is a process of its own that is killed at its time limit; the figures that it has recorded until then are
kept, and the other parts run. Models have random weights in the sizes of published ones, and nothing is downloaded.
Packages that the image lacks are unpacked from the wheels of `make gpu-wheels` (gpu/wheels.py); the report names
packages that are in neither.

    python tests/benchmarks/bench_gpu.py

needs no installation of the project. It prints a Markdown table with the goals and writes build/bench-gpu.json.
`--readme` also writes the table between the two marks in tests/benchmarks/README.md; `--show FILE.json` prints the
report of an earlier run. Without a GPU, or with `--tiny`, the same code runs at tiny sizes on the CPU, with the kernels
in Triton's interpreter. Exit code 1 if a part or a test failed or a goal is missed.
"""

import argparse
import contextlib
import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu import wheels
from gpu.records import Record, Records, is_met, read_records
from gpu.table import report, write_between_marks

ROOT = Path(__file__).resolve().parents[2]
README = Path(__file__).with_name("README.md")
DEVICE_FILES = Path("/dev")
TINY_LIMIT_FACTOR = 4
"""Factor on the time limits at tiny sizes, which run on CPUs that other processes may use too."""


@dataclass(frozen=True)
class Part:
    """A module with `run(records, tiny)`, and the time limit of its process."""

    module: str
    limit_s: int
    interpreted: bool = True
    """Whether its kernels run in Triton's interpreter at tiny sizes."""


PARTS = {
    "device": Part("gpu.device_info", 40),
    "tests": Part("gpu.gpu_tests", 60, interpreted=False),
    "reduction": Part("gpu.reduction", 55),
    "capture": Part("gpu.capture", 70, interpreted=False),
    "head": Part("gpu.student_head", 50),
    "liger": Part("gpu.liger", 40),
    "training": Part("gpu.training", 50, interpreted=False),
    "compiled": Part("gpu.compiled", 85, interpreted=False),
    "decode": Part("gpu.decode", 25, interpreted=False),
}
"""The most important first. The limits add up to less than eight minutes."""


def main() -> int:
    """Run the parts, print the report, write the records."""
    arguments = _arguments()
    if arguments.part:
        for name in arguments.part:
            run_part(name, arguments.records, arguments.tiny)
        return 0
    found = json.loads(arguments.show.read_text("utf-8")) if arguments.show else measure(arguments)
    text = report(found)
    print(text)
    if arguments.readme:
        write_between_marks(README, text)
    return int(not is_success(found))


def measure(arguments: argparse.Namespace) -> Record:
    """Run every part and return {about, parts, records}. `--out` is written after each part, in case of a kill."""
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        site = Path(folder, "site")
        about: Record = {
            "date": datetime.date.today().isoformat(),
            "commit": arguments.commit or _commit(),
            "missing_packages": wheels.unpack(arguments.wheels, site),
        }
        environment = _environment(site)
        states: dict[str, Record] = {}
        records: list[Record] = []
        result = {"about": about, "parts": states, "records": records}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        tiny = arguments.tiny or not any(DEVICE_FILES.glob("nvidia[0-9]*"))
        for name in ("device", *(name for name in arguments.parts if name != "device")):
            states[name], found = _run_in_process(name, Path(folder), environment, tiny)
            records += found
            if name == "device":
                for record in (record for record in found if record["kind"] == "device"):
                    about |= record
                tiny = arguments.tiny or (about["device"] == "cpu" if "device" in about else tiny)
                about["sizes"] = "tiny" if tiny else "full"
            about["seconds"] = round(time.monotonic() - started_s, 1)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return result


def is_success(found: Record) -> bool:
    """Return whether every part ended, no test or case failed, and no goal is missed that these sizes can judge.

    On a GPU, no test of the part `tests` may be skipped.
    """
    full = found["about"]["sizes"] == "full"
    goals, tests = ([r for r in found["records"] if r["kind"] == kind] for kind in ("goal", "test"))
    return (
        all(part["state"] == "done" for part in found["parts"].values())
        and not any(record["kind"] == "failure" for record in found["records"])
        and not any(record.get("outcome") in ("failed", "skipped" if full else None) for record in tests)
        and all(is_met(goal) for goal in goals if full or goal["is_numerical"])
    )


def _run_in_process(name: str, folder: Path, environment: dict[str, str], tiny: bool) -> tuple[Record, list[Record]]:
    """Run a part in a process of its own; return how it ended, and its records."""
    limit_s = PARTS[name].limit_s * (TINY_LIMIT_FACTOR if tiny else 1)
    part, records, log = PARTS[name], folder / f"{name}.jsonl", folder / f"{name}.log"
    command = [sys.executable, __file__, "--part", name, "--records", str(records), *(["--tiny"] if tiny else [])]
    # A cache for each part: a killed compiler leaves incomplete files.
    caches = {
        "TRITON_CACHE_DIR": str(folder / name / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / name / "torch"),
    }
    environment = environment | caches | ({"TRITON_INTERPRET": "1"} if tiny and part.interpreted else {})
    print(f"bench-gpu: {name}, at most {limit_s} s", file=sys.stderr, flush=True)
    started_s = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
            state = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            state = f"killed at its limit of {limit_s} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = read_records(records)
    printed = log.read_text("utf-8", "replace")
    if state != "done" or any(record["kind"] == "failure" for record in found):
        print(printed[-3000:], file=sys.stderr, flush=True)
    if state.startswith("failed"):
        state += f": {printed.strip().splitlines()[-1][:200]}" if printed.strip() else ""
    return {"state": state, "seconds": round(time.monotonic() - started_s, 1), "log": printed[-5000:]}, found


def run_part(name: str, records: Path, tiny: bool) -> None:
    """Run one part in this process."""
    sys.path.insert(1, str(ROOT))  # after this folder, so that `gpu` is the package next to this file
    importlib.import_module(PARTS[name].module).run(Records(records, name), tiny)


def _environment(site: Path) -> dict[str, str]:
    path = [str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), **fixed}


def _commit() -> str:
    """Return the commit's hash, with a plus if files have changed; `unknown` without git or its folder."""
    try:
        done = [
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done[0] + ("+" if done[1] else "")


def _arguments(given: list[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, as without a GPU")
    parser.add_argument("--wheels", type=Path, default=wheels.FOLDER)
    parser.add_argument("--commit", help="default: the commit of git's folder")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench-gpu.json")
    parser.add_argument("--readme", action="store_true", help=f"write the report between the marks in {README.name}")
    parser.add_argument("--show", type=Path, help="print the report of an earlier run's JSON; measure nothing")
    parser.add_argument("--part", nargs="+", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--records", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
