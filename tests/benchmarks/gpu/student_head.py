"""Part `head`: forward and backward pass of the student's LM head and its loss, compared with dense losses.

    ce       cross-entropy, dense logits
    dense    KL to the teacher's full distribution and cross-entropy, dense logits
    chunked  KL to the kept entries and their tail, and cross-entropy, by `student.head.chunked`

Peak memory is what a step adds to hidden states and weight: gradients, targets and a dense teacher count.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from gpu.records import Records
from gpu.timing import device, interleaved_ms, peak_bytes
from pipeline.contracts import TargetMode
from student.data.targets import Targets
from student.head.chunked import HeadSpec, head_loss

KD, CE, TAIL = 0.6, 0.4, 0.05
MAX_TIME, MAX_MEMORY = 1.03, 0.15
MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Relative error of a gradient to float64 for the same inputs: the factors of products are rounded to the dtype."""


@dataclass(frozen=True)
class Sizes:
    """Shapes of the head, rows of a step, and rows whose gradients are compared with float64."""

    widths: tuple[int, ...]
    vocabularies: tuple[int, ...]
    tokens: int
    k: int
    chunk_rows: int
    checked_rows: int
    rounds: int
    kernel: Literal["auto", "triton"]


FULL = Sizes((4096, 2048), (151_936, 49_152), 8192, 64, 512, 64, 3, "auto")
TINY = Sizes((16,), (640,), 12, 8, 6, 4, 1, "triton")


@dataclass(frozen=True)
class Case:
    """Inputs of one shape and dtype."""

    name: str
    hidden_TD: Tensor
    weight_VD: Tensor
    targets: Targets

    def step(self, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        """Return a function that runs forward and backward with cleared gradients."""

        def step() -> None:
            self.hidden_TD.grad = self.weight_VD.grad = None
            loss(self.hidden_TD, self.weight_VD).backward()

        return step

    def clear_gradients(self) -> None:
        """Free the gradients."""
        self.hidden_TD.grad = self.weight_VD.grad = None


def run(records: Records, tiny: bool) -> None:
    """Measure every shape, in bfloat16 first."""
    sizes = TINY if tiny else FULL
    for dtype, width, vocabulary in shapes(sizes):
        with records.catch_failure(case_name(dtype, width, vocabulary)):
            case = make_case(dtype, width, vocabulary, sizes)
            _measure(records, case, sizes)
            _check(records, case, sizes)


def shapes(sizes: Sizes) -> list[tuple[torch.dtype, int, int]]:
    """Return (dtype, width, vocabulary), the most important first."""
    dtypes = (torch.bfloat16, torch.float32)
    return list(itertools.product(dtypes, sizes.widths, sizes.vocabularies))


def case_name(dtype: torch.dtype, width: int, vocabulary: int) -> str:
    """Return the name of a shape in the table."""
    return f"D={width:,} V={vocabulary:,} {str(dtype).removeprefix('torch.')}"


def make_case(dtype: torch.dtype, width: int, vocabulary: int, sizes: Sizes) -> Case:
    """Draw random inputs and targets of a shape."""
    torch.manual_seed(0)
    like = {"device": device(), "dtype": dtype}
    hidden_TD = torch.randn(sizes.tokens, width, **like).requires_grad_()
    weight_VD = torch.randn(vocabulary, width, **like).mul_(width**-0.5).requires_grad_()
    targets = random_targets(sizes.tokens, vocabulary, sizes.k)
    return Case(case_name(dtype, width, vocabulary), hidden_TD, weight_VD, targets)


def random_targets(tokens: int, vocabulary: int, k: int) -> Targets:
    """Return random top-k targets: distinct ids in each row, and TAIL as the mass of the tail."""
    stride, on = vocabulary // k, {"device": device()}
    id_TK = torch.randint(stride, (tokens, k), **on) + stride * torch.arange(k, **on)
    logweight_TK = (2 * torch.randn(tokens, k, **on)).sort(dim=1, descending=True).values.log_softmax(dim=1)
    zeros_T = torch.zeros(tokens, **on)
    tail_T = torch.full((tokens,), TAIL, **on).log()
    return Targets(
        label_T=torch.randint(vocabulary, (tokens,), **on),
        weight_T=zeros_T + 1,
        entry_id_TK=id_TK,
        entry_logweight_TK=logweight_TK + torch.log1p(-tail_T.exp())[:, None],
        tail_logmass_T=tail_T,
        teacher_label_logprob_T=zeros_T,
        teacher_entropy_T=zeros_T,
        log_partition_T=None,
        mode=TargetMode.TOPK,
    )


def _measure(records: Records, case: Case, sizes: Sizes) -> None:
    teacher_TV = torch.randn(sizes.tokens, len(case.weight_VD), device=device()).mul_(2).log_softmax(dim=1)
    spec = HeadSpec(kd=KD, ce=CE, kernel=sizes.kernel)
    variants = {
        "ce": case.step(lambda hidden, weight: ce_loss(hidden @ weight.T, case.targets)),
        "dense": case.step(lambda hidden, weight: _dense_loss(hidden @ weight.T, teacher_TV, case.targets)),
        "chunked": case.step(lambda h, w: head_loss(h, w, None, case.targets, spec, sizes.chunk_rows).total),
    }
    found_ms = interleaved_ms(variants, sizes.rounds)
    target_bytes = {"ce": 0, "dense": teacher_TV.nbytes, "chunked": _bytes(case.targets)}
    found_bytes = {}
    for variant, ms in found_ms.items():
        case.clear_gradients()
        found_bytes[variant] = peak_bytes(variants[variant]) + target_bytes[variant]
        records.figure(
            case.name, variant, ms=ms, rate=sizes.tokens / (ms / 1000), unit="tokens/s", ratio=ms / found_ms["ce"],
            to="ce", peak_bytes=found_bytes[variant],
        )  # fmt: skip
    case.clear_gradients()
    records.goal(case.name, "head: time of chunked to ce", found_ms["chunked"] / found_ms["ce"], at_most=MAX_TIME)
    share = found_bytes["chunked"] / max(found_bytes["dense"], 1)
    records.goal(case.name, "head: memory of chunked to dense", share, at_most=MAX_MEMORY)


def _bytes(targets: Targets) -> int:
    values = (getattr(targets, field.name) for field in fields(targets))
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def ce_loss(logits_TV: Tensor, targets: Targets) -> Tensor:
    """Return the sum of the cross-entropies with the labels."""
    return functional.cross_entropy(logits_TV.float(), targets.label_T, reduction="sum")


def _dense_loss(logits_TV: Tensor, teacher_TV: Tensor, targets: Targets) -> Tensor:
    student_TV = logits_TV.float().log_softmax(dim=1)
    kd = functional.kl_div(student_TV, teacher_TV, reduction="sum", log_target=True)
    return KD * kd + CE * ce_loss(logits_TV, targets)


def _check(records: Records, case: Case, sizes: Sizes) -> None:
    """Compare the gradients of some rows with those of dense float64 autograd for the same inputs."""
    targets = case.targets.rows_at(torch.arange(sizes.checked_rows, device=device()))
    hidden_TD = case.hidden_TD.detach()[: sizes.checked_rows]
    spec = HeadSpec(kd=KD, ce=CE, kernel=sizes.kernel)
    inputs = [tensor.detach().requires_grad_() for tensor in (hidden_TD, case.weight_VD)]
    ours = torch.autograd.grad(head_loss(*inputs, None, targets, spec, sizes.chunk_rows).total, inputs)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_TD, case.weight_VD)]
    reference = torch.autograd.grad(_reference_loss(*exact, targets), exact)
    for name, got, expected in zip(("hidden states", "weight"), ours, reference, strict=True):
        error = float((got.double() - expected).norm() / expected.norm())
        quantity = f"head: error of the gradient of the {name} to float64"
        records.goal(case.name, quantity, error, at_most=MAX_ERROR[hidden_TD.dtype], is_numerical=True)


def _reference_loss(hidden_TD: Tensor, weight_VD: Tensor, targets: Targets) -> Tensor:
    """Return KL over kept entries and tail, and cross-entropy, from dense logits."""
    student_TV = (hidden_TD @ weight_VD.T).log_softmax(dim=1)
    kept_TK = student_TV.gather(1, targets.entry_id_TK)
    tail_T = student_TV.scatter(1, targets.entry_id_TK, -torch.inf).logsumexp(dim=1)
    entry_TK, rest_T = targets.entry_logweight_TK.double(), targets.tail_logmass_T.double()
    kd = (entry_TK.exp() * (entry_TK - kept_TK)).sum() + (rest_T.exp() * (rest_T - tail_T)).sum()
    return KD * kd + CE * functional.nll_loss(student_TV, targets.label_T, reduction="sum")
