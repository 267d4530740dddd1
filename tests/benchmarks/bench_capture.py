"""Measures the throughput of capture beside bare prefill: four ways to run the same tokens through the same teacher.

    bare_prefill     vLLM's prefill with max_tokens=1, nothing kept: the upper bound
    capture          k=64, scalars and one hidden layer, encoded and committed to disk as shards
    prompt_logprobs  vLLM's `prompt_logprobs=64` with flat logprobs; nothing written
    transformers     the transformers engine, the same signals as capture; nothing written

Each way runs in its own process, in turn, `--rounds` times; the round with the least CPU time is reported. CPU time is
that of all threads, which other load affects less than wall time; peak memory is the process' maximum RSS, with model
and KV cache. Below the table: capture's wall time by part, on the engine's thread and on the thread that encodes
and commits.

    python tests/benchmarks/bench_capture.py --model NAME_OR_DIR [--text FILE.jsonl] [--tokens 16384]

prints both and writes build/bench-capture.json: {way: {tokens_per_s, cpu_s, peak_bytes}, "about": {...}}; capture also
has ms_a_token, by part.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.capture import TeacherSpec
from pipeline.contracts import CaptureSpec, ScoredSequence, TokenSequence
from pipeline.models.dtype import preferred_dtype
from pipeline.models.folders import ModelFolder, resolve_model

WAYS = ("bare_prefill", "capture", "prompt_logprobs", "transformers")
K = 64
UNIT_SEQUENCES = 8
WARM_UP_SEQUENCES = 4

Score = Callable[[list[TokenSequence]], None]
Measured = dict[str, Any]


def main() -> None:
    """Measure every way in its own process, print the table, write the record."""
    arguments = _arguments()
    if arguments.only:
        print("MEASURED " + json.dumps(measure(arguments)), flush=True)
        return
    best: dict[str, Measured] = {}
    for _ in range(arguments.rounds):
        for way in arguments.ways:
            measured = _in_own_process(way)
            if way not in best or measured["cpu_s"] < best[way]["cpu_s"]:
                best[way] = measured
            rates = f"{measured['tokens_per_s']:.0f} tokens/s, {measured['cpu_s']:.1f} CPU s"
            print(f"{way}: {rates}", file=sys.stderr, flush=True)
    _print_table(best)
    if {"bare_prefill", "capture"} <= best.keys():
        _print_goals(best["bare_prefill"], best["capture"], arguments)
    about = {"model": arguments.model, "tokens": arguments.tokens, "sequence_length": arguments.sequence_length,
             "k": K, "rounds": arguments.rounds, "cpus": os.cpu_count(), "machine": platform.machine()}  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(best | {"about": about}, indent=2) + "\n", "utf-8")


def measure(arguments: argparse.Namespace) -> Measured:
    """Run one way over all sequences in this process, after a warm-up."""
    model = resolve_model(arguments.model)
    sequences = _sequences(arguments, model)
    teacher = TeacherSpec(
        name="bench", model=arguments.model, max_batched_tokens=arguments.max_batched_tokens, dtype=arguments.dtype,
        engine="transformers" if arguments.only == "transformers" else "vllm", chunk_rows=arguments.chunk_rows,
    )  # fmt: skip
    score = (_engine if arguments.only in ("capture", "transformers") else _vllm)(teacher, model, arguments.only)
    score(sequences[:WARM_UP_SEQUENCES])
    parts_s = _time_parts() if arguments.only == "capture" else {}
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    score(sequences)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    tokens = sum(len(sequence.input_ids_N) for sequence in sequences)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    measured: Measured = {
        "tokens_per_s": tokens / wall_s, "cpu_s": cpu_s, "peak_bytes": peak, "tokens_per_cpu_s": tokens / cpu_s
    }  # fmt: skip
    if parts_s:
        measured["ms_a_token"] = {name: 1000 * s / tokens for name, s in _by_part(parts_s, wall_s).items()}
    return measured


def _time_parts() -> dict[str, float]:
    """Start to time the pooler, its reduction, and encoding. Return the seconds by part, updated on every call."""
    import pipeline.cache.format.shard_writer
    from actors.engines import pooler

    seconds = dict.fromkeys(("pooler", "reduction", "encoding"), 0.0)

    def time_calls(owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **named)
            seconds[part] += time.perf_counter() - start
            return result

        setattr(owner, name, timed)

    time_calls(pooler.SignalPooler, "forward", "pooler")
    time_calls(pooler, "reduce_rows", "reduction")
    time_calls(pipeline.cache.format.shard_writer, "encode_shard", "encoding")
    return seconds


def _by_part(parts_s: dict[str, float], wall_s: float) -> dict[str, float]:
    return {
        "body and schedule": wall_s - parts_s["pooler"],
        "LM head": parts_s["pooler"] - parts_s["reduction"],
        "reduction": parts_s["reduction"],
        "in the other thread: encoding": parts_s["encoding"],
    }


def _vllm(teacher: TeacherSpec, model: ModelFolder, way: str) -> Score:
    """vLLM's generate API with the settings of the capture engine."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING", VLLM_NO_USAGE_STATS="1")
    import vllm

    logprobs = K if way == "prompt_logprobs" else None
    llm = vllm.LLM(
        model=str(model.path), dtype=teacher.dtype, max_num_batched_tokens=teacher.max_batched_tokens,
        enable_chunked_prefill=True, enable_prefix_caching=False, enforce_eager=True, disable_log_stats=True,
        kv_cache_memory_bytes=int(teacher.kv_cache_gib * 2**30), max_logprobs=K,
    )  # fmt: skip
    parameters = vllm.SamplingParams(
        max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=logprobs, flat_logprobs=logprobs is not None
    )

    def score(sequences: list[TokenSequence]) -> None:
        for unit in _units(sequences):
            prompts = [vllm.TokensPrompt(prompt_token_ids=s.input_ids_N.tolist()) for s in unit]
            outputs = llm.generate(prompts, parameters, use_tqdm=False)
            assert logprobs is None or len(outputs[0].prompt_logprobs) == len(unit[0].input_ids_N)

    return score


def _engine(teacher: TeacherSpec, model: ModelFolder, way: str) -> Score:
    """The project's engine; `capture` encodes and commits a unit while the next is scored, as a teacher actor does."""
    from actors.engines import open_engine
    from pipeline.cache.commit import commit_unit
    from pipeline.cache.description import write_cache_identity
    from pipeline.cache.format import shard_writer as shards
    from pipeline.cache.format.schema import ShardSpec
    from pipeline.cache.storage.store import Store

    layer = model.text_config["num_hidden_layers"] // 2
    spec = CaptureSpec(k=K, hidden_layers=(layer,))
    engine = open_engine(teacher, model, spec)
    shard = ShardSpec.of(spec, engine.describe())
    Path("build").mkdir(exist_ok=True)
    folder = tempfile.TemporaryDirectory(prefix="bench-capture-", dir="build")
    store, numbers = Store.open(folder.name), count()
    write_cache_identity(store, {"of": "the benchmark"})

    def save(number: int, rows: list[ScoredSequence], temporary: object = folder) -> None:
        commit_unit(store, f"train-{number:05d}", shards.encode_shard(rows, shard), rows)

    def score(sequences: list[TokenSequence]) -> None:
        with ThreadPoolExecutor(1) as writer:
            saved = []
            for unit in _units(sequences):
                rows = [ScoredSequence(s, signals) for s, signals in zip(unit, engine.score(unit), strict=True)]
                if way == "capture":
                    saved.append(writer.submit(save, next(numbers), rows))
            for done in saved:
                done.result()

    return score


def _units(sequences: list[TokenSequence]) -> Iterator[list[TokenSequence]]:
    for start in range(0, len(sequences), UNIT_SEQUENCES):
        yield sequences[start : start + UNIT_SEQUENCES]


def _sequences(arguments: argparse.Namespace, model: ModelFolder) -> list[TokenSequence]:
    """Cut the concatenated documents into windows of `--sequence-length` tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model.path), local_files_only=True, trust_remote_code=False)
    length, ids = arguments.sequence_length, []
    for line in arguments.text.read_text("utf-8").splitlines():
        ids += tokenizer(json.loads(line)["text"], verbose=False)["input_ids"]
        if len(ids) >= arguments.tokens:
            break
    windows = np.array(ids[: len(ids) // length * length][: arguments.tokens], np.int32).reshape(-1, length)
    ones, ends = np.ones(length, np.uint8), np.arange(1, length + 1, dtype=np.int32)
    return [TokenSequence(f"s{i}", f"d{i}", None, "train", row, ones, ends) for i, row in enumerate(windows)]


def _in_own_process(way: str) -> Measured:
    command = [sys.executable, __file__, *sys.argv[1:], "--only", way]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    if not lines:
        raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
    measured: Measured = json.loads(lines[0].removeprefix("MEASURED "))
    return measured


def _print_table(best: dict[str, Measured]) -> None:
    bare = best.get("bare_prefill")
    print(f"{'':16}{'tokens/s':>10}{'of bare':>9}{'CPU s':>8}{'of bare':>9}{'peak MiB':>10}")
    for way, measured in best.items():
        shares = ("", "") if bare is None else (
            f"{measured['tokens_per_s'] / bare['tokens_per_s']:.2f}", f"{bare['cpu_s'] / measured['cpu_s']:.2f}"
        )  # fmt: skip
        print(
            f"{way:16}{measured['tokens_per_s']:10.0f}{shares[0]:>9}{measured['cpu_s']:8.1f}{shares[1]:>9}"
            f"{measured['peak_bytes'] / 2**20:10.0f}"
        )
    if "capture" in best:
        parts = best["capture"]["ms_a_token"].items()
        print("capture, ms a token: " + ", ".join(f"{name} {ms:.3f}" for name, ms in parts))


def _print_goals(bare: Measured, capture: Measured, arguments: argparse.Namespace) -> None:
    import torch

    share, goal = capture["tokens_per_s"] / bare["tokens_per_s"], 0.90 if torch.cuda.is_available() else 0.75
    above_mib = (capture["peak_bytes"] - bare["peak_bytes"]) / 2**20
    chunk_mib = 4 * arguments.chunk_rows * resolve_model(arguments.model).text_config["vocab_size"] / 2**20
    print(f"{_verdict(share >= goal)} tokens a second, of bare prefill: {share:.2f}, at least {goal:.2f}")
    print(
        f"{_verdict(above_mib <= chunk_mib)} MiB above bare prefill: {above_mib:.0f}, at most a chunk, {chunk_mib:.0f}"
    )


def _verdict(met: bool) -> str:
    return "met   " if met else "MISSED"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, required=True, help="JSON lines with a `text` each")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--max-batched-tokens", type=int, default=2048)
    parser.add_argument("--chunk-rows", type=int, default=TeacherSpec.model_fields["chunk_rows"].default)
    parser.add_argument("--dtype", default=preferred_dtype(), choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("build/bench-capture.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
