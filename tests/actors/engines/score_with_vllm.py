"""Hosts teachers in vLLM, each in its own process: vLLM binds threads and keeps memory until its process ends.

    python score_with_vllm.py JOB.json OUT    JOB: {name: {"model", "teacher", "spec", "calls": [[row, ...], ...]}, ...}

The processes are forked after `import vllm`, which takes longer than the rest. Writes OUT/<name>-<call>-<row>.npz for
every scored row, and OUT/<name>.json: "scored" or the error of each call, or the error of opening the engine.
"""

import dataclasses
import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np

from actors.engines import open_engine
from pipeline.config.capture import CaptureSettings, TeacherSpec
from pipeline.contracts import TokenSequence
from pipeline.errors import StillhouseError
from pipeline.models.folders import resolve_model


def row_of(values):
    ids = np.array(values["ids"], np.int32)
    ones = np.ones(len(ids), np.uint8)
    ends = np.arange(1, len(ids) + 1, dtype=np.int32)
    return TokenSequence(values["name"], "d", None, "train", ids, ones, ends, audited=values["audited"])


def save(path, signals):
    arrays = {f.name: getattr(signals, f.name) for f in dataclasses.fields(signals)}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def host(name, job, out):
    spec = CaptureSettings(**job["spec"]).spec(job.get("seed", 0))
    outcomes = []
    try:
        engine = open_engine(TeacherSpec(**job["teacher"]), resolve_model(job["model"]), spec)
        for number, rows in enumerate(job["calls"]):
            try:
                for index, signals in enumerate(engine.score([row_of(row) for row in rows])):
                    save(Path(out) / f"{name}-{number}-{index}.npz", signals)
                outcomes.append("scored")
            except StillhouseError as error:
                outcomes.append(f"{type(error).__name__}: {error}")
        engine.close()
    except StillhouseError as error:
        outcomes.append(f"{type(error).__name__}: {error}")
    Path(out, f"{name}.json").write_text(json.dumps(outcomes))


def main(job_file, out):
    from vllm import LLM  # noqa: F401

    for name, job in json.loads(Path(job_file).read_text()).items():
        process = multiprocessing.get_context("fork").Process(target=host, args=(name, job, out))
        process.start()
        process.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
