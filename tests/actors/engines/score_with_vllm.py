"""Hosts teachers in vLLM in a process of its own: vLLM binds threads and memory for as long as its process lives.

    python score_with_vllm.py JOB.json OUT    JOB: {"refused": [hosted, ...], "hosted": hosted}
                                              hosted: {"model", "teacher", "spec", "calls": [[row, ...], ...]}

The refused are asked first, in the same process. Writes OUT/<call>-<row>.npz for every row that was scored, and prints
one JSON line: what each opening or call ended with.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from actors.engines import open_engine
from pipeline.config.capture import CaptureSettings, TeacherSpec
from pipeline.contracts import TokenSequence
from pipeline.errors import StillhouseError
from pipeline.model_store import resolve_model


def row_of(values):
    ids = np.array(values["ids"], np.int32)
    ones = np.ones(len(ids), np.uint8)
    ends = np.arange(1, len(ids) + 1, dtype=np.int32)
    return TokenSequence(values["name"], "d", None, "train", ids, ones, ends, audited=values["audited"])


def save(path, signals):
    arrays = {f.name: getattr(signals, f.name) for f in dataclasses.fields(signals)}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def host(job, out):
    spec = CaptureSettings(**job["spec"]).spec(job.get("seed", 0))
    ends = []
    try:
        engine = open_engine(TeacherSpec(**job["teacher"]), resolve_model(job["model"]), spec)
        for number, rows in enumerate(job["calls"]):
            try:
                for index, signals in enumerate(engine.score([row_of(row) for row in rows])):
                    save(Path(out) / f"{number}-{index}.npz", signals)
                ends.append("scored")
            except StillhouseError as error:
                ends.append(f"{type(error).__name__}: {error}")
        engine.close()
    except StillhouseError as error:
        ends.append(f"{type(error).__name__}: {error}")
    return ends


def main(job_file, out):
    job = json.loads(Path(job_file).read_text())
    ends = [end for hosted in (*job["refused"], job["hosted"]) for end in host(hosted, out)]
    print("ENDS " + json.dumps(ends), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
