"""Measures time and memory of one forward and backward pass of the LM head and its loss, beside plain training.

    ce       cross-entropy with the label, dense logits: training without a teacher
    dense    KL to the teacher's full distribution and cross-entropy, dense logits
    sparse   KL to the teacher's kept entries and tail, and cross-entropy, dense logits
    chunked  the same loss as `sparse`, by `student.head.chunked`

`--variants` can add `recompute` (`sparse` in chunks with activation checkpointing) and `liger` (the default on a GPU if
liger-kernel is installed): Liger's fused distillation loss, forward KL to a teacher's LM head of the same size, and
cross-entropy.

Every measurement runs in its own process. `peak_bytes` is the peak of the process (on a GPU: of the allocator) minus
the memory with hidden states and weight only; gradients, targets and a dense teacher count. `seconds` is the best of
`--rounds`; each round runs every variant once, so that other load affects all alike. With one CPU
thread it is CPU time, otherwise wall time.

The last record, `training`, is a short training with a cache on the local disk (bench_student_input.py): the share of
its time spent waiting for input.

    python tests/benchmarks/bench_student.py [--vocabularies 49152 151936] [--tokens 2048] [--device cpu]

writes build/bench-student.json: a list of records with variant, vocabulary, tokens, seconds, peak_bytes, and in
`training` input_wait_share. Exit code 1 if a goal is missed. `--run STORAGE` also prints that run's wait shares.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench_student_input import training_record, wait_share

WIDTH, ENTRIES, KD, CE = 576, 64, 0.6, 0.4
VARIANTS = ("ce", "dense", "sparse", "chunked")
RECOMPUTED_ROWS = 256
MOST_TIME, MOST_MEMORY, MOST_WAIT = 1.15, 0.15, 0.02


def main() -> int:
    """Measure all variants and shapes, print the table, write the records. Return 1 if a goal is missed."""
    arguments = _arguments()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.vocabularies[0], arguments.tokens[0], arguments)))
        return 0
    records = [
        record
        for vocabulary in arguments.vocabularies
        for tokens in arguments.tokens
        for record in _shape(vocabulary, tokens, arguments)
    ]
    records.append(training_record(arguments.device, arguments.threads))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(records, indent=1) + "\n")
    print(table(records))
    for timing in sorted(arguments.run.glob("students/*/timing.jsonl")) if arguments.run else ():
        steps = [json.loads(line) for line in timing.read_text().splitlines()]
        print(f"{timing.parent.name}: waited for input for {wait_share(steps):.2%} of the time.")
    return int(any(got > goal for _, got, goal in goals(records)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, "recompute", "liger"])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[49152, 151936])
    parser.add_argument("--tokens", type=int, nargs="+", help="unset: 2048, and on a GPU 8192")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--chunk-rows", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("build/bench-student.json"))
    parser.add_argument("--run", type=Path, help="storage of a finished run on this machine")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    on_gpu = arguments.device != "cpu"
    extra = ["liger"] if on_gpu and find_spec("liger_kernel") is not None else []
    arguments.variants = arguments.variants or [*VARIANTS, *extra]
    arguments.tokens = arguments.tokens or ([2048, 8192] if on_gpu else [2048])
    return arguments


def _shape(vocabulary: int, tokens: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the fastest round of each variant."""
    rounds = [
        [_in_a_process(v, vocabulary, tokens, arguments) for v in arguments.variants] for _ in range(arguments.rounds)
    ]
    return [min(records, key=lambda record: record["seconds"]) for records in zip(*rounds, strict=True)]


def _in_a_process(variant: str, vocabulary: int, tokens: int, arguments: argparse.Namespace) -> dict[str, Any]:
    passed = [f"--{name}={getattr(arguments, name)}" for name in ("threads", "device", "dtype")]
    shape = [f"--vocabularies={vocabulary}", f"--tokens={tokens}", f"--chunk-rows={arguments.chunk_rows}"]
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(
        [sys.executable, __file__, "--one", variant, *shape, *passed],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


def measure(variant: str, vocabulary: int, tokens: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one warm-up and one timed pass of a variant in this process; return its record."""
    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    options = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    hidden_TD = torch.randn(tokens, WIDTH, **options).requires_grad_()
    weight_VD = torch.randn(vocabulary, WIDTH, **options).mul_(WIDTH**-0.5).requires_grad_()
    before = _memory_now(arguments.device)
    step = _step_of(variant, hidden_TD, weight_VD, arguments)
    seconds = [_one_step(step, hidden_TD, weight_VD, arguments) for _ in range(2)][-1]
    peak_bytes = _memory_peak(arguments.device) - before
    return {
        "variant": variant,
        "vocabulary": vocabulary,
        "tokens": tokens,
        "seconds": round(seconds, 4),
        "peak_bytes": peak_bytes,
        "device": arguments.device,
        "dtype": arguments.dtype,
    }


def _one_step(step: Callable[[], Any], hidden_TD: Any, weight_VD: Any, arguments: argparse.Namespace) -> float:
    """Return the seconds of one forward and backward pass from cleared gradients."""
    clock = time.process_time if (arguments.device, arguments.threads) == ("cpu", 1) else time.perf_counter
    hidden_TD.grad = weight_VD.grad = None
    _wait(arguments.device)
    start = clock()
    step().backward()
    _wait(arguments.device)
    return clock() - start


def _step_of(variant: str, hidden_TD: Any, weight_VD: Any, arguments: argparse.Namespace) -> Callable[[], Any]:
    """Create the variant's targets and return a function that computes its loss."""
    import torch
    from torch.nn import functional
    from torch.utils.checkpoint import checkpoint

    tokens, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
    label_T = torch.randint(vocabulary, (tokens,), device=arguments.device)

    def ce(logits_TV: Any) -> Any:
        return functional.cross_entropy(logits_TV.float(), label_T, reduction="sum")

    if variant == "ce":
        return lambda: ce(hidden_TD @ weight_VD.T)
    if variant == "dense":
        teacher_TV = torch.randn(tokens, vocabulary, device=arguments.device).mul_(2).log_softmax(dim=1)

        def dense() -> Any:
            logits_TV = hidden_TD @ weight_VD.T
            student_TV = logits_TV.float().log_softmax(dim=1)
            kd = functional.kl_div(student_TV, teacher_TV, reduction="sum", log_target=True)
            return KD * kd + CE * ce(logits_TV)

        return dense
    if variant == "liger":
        return _liger(hidden_TD, weight_VD, label_T)
    targets = _sparse_targets(tokens, vocabulary, label_T, arguments.device)
    if variant == "chunked":
        from student.head.chunked import HeadSpec, head_loss

        spec = HeadSpec(kd=KD, ce=CE)
        return lambda: head_loss(hidden_TD, weight_VD, None, targets, spec, arguments.chunk_rows).total

    def sparse(hidden_RD: Any, weight_VD: Any, start: int) -> Any:
        rows = targets.rows_at(torch.arange(start, start + len(hidden_RD), device=arguments.device))
        logits_RV = hidden_RD @ weight_VD.T
        kept_RK = logits_RV.float().log_softmax(dim=1).gather(1, rows.entry_id_TK)
        tail_R = (1.0 - kept_RK.exp().sum(dim=1)).clamp_min(1e-8).log()
        p_RK, p_R = rows.entry_logweight_TK.exp(), rows.tail_logmass_T.exp()
        kd = (p_RK * (rows.entry_logweight_TK - kept_RK)).sum() + (p_R * (rows.tail_logmass_T - tail_R)).sum()
        return KD * kd + CE * functional.cross_entropy(logits_RV.float(), rows.label_T, reduction="sum")

    def recompute() -> Any:
        chunks = enumerate(hidden_TD.split(RECOMPUTED_ROWS))
        return sum(
            checkpoint(sparse, hidden_RD, weight_VD, at * RECOMPUTED_ROWS, use_reentrant=False)
            for at, hidden_RD in chunks
        )

    return recompute if variant == "recompute" else lambda: sparse(hidden_TD, weight_VD, 0)


def _liger(hidden_TD: Any, weight_VD: Any, label_T: Any) -> Callable[[], Any]:
    """Return Liger's loss as a sum over tokens, like the others: its mean times the number of tokens."""
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=CE, weight_soft_loss=KD, beta=0.0)
    teacher_TD, teacher_VD = torch.randn_like(hidden_TD), 2 * torch.randn_like(weight_VD) * WIDTH**-0.5
    return lambda: len(label_T) * loss(hidden_TD, weight_VD, teacher_TD, teacher_VD, label_T)


def _sparse_targets(tokens: int, vocabulary: int, label_T: Any, device: str) -> Any:
    """Return random top-k targets: distinct ids in each row, with 5 % of the mass in the tail."""
    import torch

    from pipeline.contracts import TargetMode
    from student.data.targets import Targets

    stride = vocabulary // ENTRIES
    id_TK = torch.randint(stride, (tokens, ENTRIES), device=device) + stride * torch.arange(ENTRIES, device=device)
    logweight_TK = (2 * torch.randn(tokens, ENTRIES, device=device)).sort(dim=1, descending=True).values
    zeros_T = torch.zeros(tokens, device=device)
    tail_T = torch.full((tokens,), 0.05, device=device).log()
    return Targets(
        label_T=label_T,
        weight_T=zeros_T + 1,
        entry_id_TK=id_TK,
        entry_logweight_TK=logweight_TK.log_softmax(dim=1) + torch.log1p(-tail_T.exp())[:, None],
        tail_logmass_T=tail_T,
        teacher_label_logprob_T=zeros_T,
        teacher_entropy_T=zeros_T,
        log_partition_T=None,
        mode=TargetMode.TOPK,
    )


def _wait(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def _memory_now(device: str) -> int:
    """Return the bytes in use, and reset the peak."""
    import torch

    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _memory_peak(device: str) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if device != "cpu" else _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: no {field}")


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return the records as a Markdown table with the ratios that have goals, and the goals as met or missed."""
    lines = [
        "| vocabulary | tokens | variant | seconds | to ce | peak MiB | to dense |",
        "|---:|---:|---|---:|---:|---:|---:|",
    ]
    for record in records:
        shape = (record["vocabulary"], record["tokens"])
        same = {other["variant"]: other for other in records if (other["vocabulary"], other["tokens"]) == shape}
        seconds, peak = record["seconds"], record["peak_bytes"]
        slower = seconds / same["ce"]["seconds"] if "ce" in same else float("nan")
        larger = peak / same["dense"]["peak_bytes"] if "dense" in same else float("nan")
        lines.append(
            f"| {shape[0]:,} | {shape[1]:,} | {record['variant']} | {seconds:.3f} | {slower:.2f} "
            f"| {peak / 2**20:,.0f} | {larger:.2f} |"
        )
    verdicts = (
        f"{'met   ' if got <= goal else 'MISSED'} {what:<50} {got:>8.4f}, at most {goal:g}"
        for what, got, goal in goals(records)
    )
    return "\n".join([*lines, "", "goals", *verdicts])


def goals(records: Sequence[dict[str, Any]]) -> Iterator[tuple[str, float, float]]:
    """Yield (name, measured, upper bound) for every goal that has records."""
    by_key = {(record["vocabulary"], record["tokens"], record["variant"]): record for record in records}
    for (vocabulary, tokens, variant), record in by_key.items():
        where = f"V={vocabulary} T={tokens}"
        plain, dense = (by_key.get((vocabulary, tokens, other)) for other in ("ce", "dense"))
        if variant == "chunked" and plain is not None:
            yield f"{where}: time of chunked to ce", record["seconds"] / plain["seconds"], MOST_TIME
        if variant == "chunked" and dense is not None:
            yield f"{where}: memory of chunked to dense", record["peak_bytes"] / dense["peak_bytes"], MOST_MEMORY
        if "input_wait_share" in record:
            yield "share of a training's time spent waiting for input", record["input_wait_share"], MOST_WAIT


if __name__ == "__main__":
    sys.exit(main())
