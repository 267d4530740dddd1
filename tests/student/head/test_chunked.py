"""The chunked head against a dense float64 oracle: full [T, V] tensors, textbook formulas, autograd."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config.training import DistributionSpec
from pipeline.contracts import TargetMode
from student.data.targets import Targets
from student.head.chunked import HeadSpec, head_loss

adaptive = importlib.import_module("student.losses.divergences.adaptive_kl")  # the package has a function of that name
TWO_SIDED = [
    "forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl", "skewed_reverse_kl", "total_variation", "adaptive_kl",
]  # fmt: skip
MIXTURE = {"forward_kl": 0.6, "reverse_kl": 0.3, "total_variation": 0.5}


def dense_buckets(logprob_TV: Tensor, targets: Targets) -> Tensor:
    """Probabilities over the kept ids and the tail, from a full distribution; padded buckets have 0."""
    kept_TK = targets.entry_logweight_TK.isfinite()
    mass_TK = logprob_TV.exp().gather(1, targets.entry_id_TK) * kept_TK
    outside_TV = torch.ones_like(logprob_TV, dtype=torch.bool)
    for row in range(targets.rows):
        outside_TV[row, targets.entry_id_TK[row][kept_TK[row]]] = False
    return torch.cat([mass_TK, (logprob_TV.exp() * outside_TV).sum(1, keepdim=True)], dim=1)


def gaps(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Adaptive KL's weights: sums of |p - q| over the largest entries up to half the mass, and over the others."""
    pairs = []
    for p_J, q_J in zip(p.detach(), q.detach(), strict=True):
        head = mass = 0.0
        for at in range(len(p_J) - 1):
            if mass < 0.5:
                head += float((p_J[at] - q_J[at]).abs())
            mass += float(p_J[at])
        pairs.append((head, float((p_J - q_J).abs().sum()) - head))
    head_T, rest_T = torch.tensor(pairs, dtype=p.dtype).T
    return head_T, rest_T


def textbook(name: str, p: Tensor, q: Tensor) -> Tensor:
    """The published formulas in probability space; 0 log 0 = 0."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        safe_a, safe_b = torch.where(a > 0, a, 1.0), torch.where(a > 0, b, 1.0)
        return (a * (safe_a.log() - safe_b.log())).sum(1)

    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, torch.cat([p[:, :-1], p[:, -1:].clamp_min(1e-6)], dim=1))
    if name == "jensen_shannon":
        return 0.3 * kl(p, 0.3 * p + 0.7 * q) + 0.7 * kl(q, 0.3 * p + 0.7 * q)
    if name == "skewed_kl":
        return kl(p, 0.2 * p + 0.8 * q)
    if name == "skewed_reverse_kl":
        return kl(q, 0.2 * q + 0.8 * p)
    if name == "adaptive_kl":
        head_T, rest_T = gaps(p, q)
        mixed = head_T * textbook("forward_kl", p, q) + rest_T * textbook("reverse_kl", p, q)
        return mixed / (head_T + rest_T)
    return 0.5 * (p - q).abs().sum(1)


def spec_of(loss: str | dict[str, float], temperature: float = 1.0, **changes: Any) -> HeadSpec:
    distribution = DistributionSpec(loss=loss, temperature=temperature, beta=0.3, skew=0.2)
    return replace(HeadSpec(kd=0.7, ce=0.4, distribution=distribution), **changes)


def dense_total(
    case: Any, loss: str | dict[str, float], temperature: float, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """(total, kd, ce), from full logits."""
    hidden_TD, weight_VD, bias_V = inputs
    logits_TV = hidden_TD @ weight_VD.T + bias_V
    teacher_TV = torch.log_softmax(case.teacher_logprob_TV / temperature, dim=1)
    p = dense_buckets(teacher_TV, case.targets)
    q = dense_buckets(torch.log_softmax(logits_TV / temperature, dim=1), case.targets)
    weights = {loss: 1.0} if isinstance(loss, str) else loss
    kd = sum((w * (case.targets.weight_T * textbook(name, p, q)).sum() for name, w in weights.items()), torch.zeros(()))
    ce_T = torch.nn.functional.cross_entropy(logits_TV, case.targets.label_T, reduction="none")
    ce = (case.targets.weight_T * ce_T).sum()
    return 0.7 * temperature**2 * kd + 0.4 * ce, kd, ce


def leaves(case: Any, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.to(dtype).requires_grad_() for x in (case.hidden_TD, case.weight_VD, case.bias_V))


@torch.no_grad()
def finite_differences(function: Callable[[], Tensor], leaf: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences by each element of `leaf`. (gradcheck runs the backward pass twice, which raises.)"""
    gradient = torch.zeros_like(leaf)
    for at in range(leaf.numel()):
        element = leaf.view(-1)[at : at + 1]
        element += step
        high = function()
        element -= 2 * step
        gradient.view(-1)[at] = (high - function()) / (2 * step)
        element += step
    return gradient


def assert_finite_differences(
    inputs: tuple[Tensor, ...], targets: Targets, loss: str | dict[str, float], temperature: float = 1.0
) -> None:
    """Differences are of the eager kernel, whichever computes the gradient: Triton's interpreter is slow."""

    def total(kernel: str = "eager") -> Tensor:
        return head_loss(*inputs, targets, spec_of(loss, temperature, kernel=kernel), 2).total

    for leaf, gradient in zip(inputs, torch.autograd.grad(total("auto"), inputs), strict=True):
        torch.testing.assert_close(gradient, finite_differences(total, leaf), rtol=1e-5, atol=1e-7)


def as_float32(targets: Targets) -> Targets:
    single = {
        name: value.float()
        for name in Targets.__slots__
        if isinstance(value := getattr(targets, name), Tensor) and value.is_floating_point()
    }
    return replace(targets, **single)


@pytest.mark.parametrize("loss", [*TWO_SIDED, MIXTURE], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_value_and_gradients_equal_the_dense_oracle(
    new_case: Callable[..., Any], loss: str | dict[str, float], temperature: float, chunk_rows: int
) -> None:
    case = new_case(temperature=temperature)
    inputs = leaves(case)
    got = head_loss(*inputs, case.targets, spec_of(loss, temperature), chunk_rows)
    got_gradients = torch.autograd.grad(got.total, inputs)
    total, kd, ce = dense_total(case, loss, temperature, inputs)
    torch.testing.assert_close((got.total, got.parts["kd"], got.parts["ce"]), (total, kd, ce))
    torch.testing.assert_close(got_gradients, torch.autograd.grad(total, inputs), rtol=1e-7, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    vocabulary=st.integers(2, 60),
    width=st.integers(1, 12),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**31),
    loss=st.sampled_from(TWO_SIDED),
    chunk_rows=st.integers(1, 10),
)
def test_float32_stays_within_1e5_of_float64_on_any_shape(
    new_case: Callable[..., Any],
    rows: int,
    vocabulary: int,
    width: int,
    share: float,
    seed: int,
    loss: str,
    chunk_rows: int,
) -> None:
    case = new_case(rows, vocabulary, width, k=1 + int(share * (vocabulary - 2)), seed=seed)
    exact = leaves(case)
    total, _, _ = dense_total(case, loss, 1.0, exact)
    single = leaves(case, torch.float32)
    got = head_loss(*single, as_float32(case.targets), spec_of(loss), chunk_rows)
    torch.testing.assert_close(got.total.double(), total, rtol=1e-5, atol=1e-5)
    pairs = zip(torch.autograd.grad(got.total, single), torch.autograd.grad(total, exact), strict=True)
    for got_gradient, gradient in pairs:
        assert (got_gradient.double() - gradient).abs().max() <= 1e-5 * max(1.0, gradient.abs().max().item())


@pytest.mark.parametrize("loss", TWO_SIDED)
def test_float32_stays_within_1e5_of_float64_at_a_real_vocabulary(new_case: Callable[..., Any], loss: str) -> None:
    case = new_case(rows=4, vocabulary=49152, width=48, k=64)
    results = []
    for dtype, targets in ((torch.float64, case.targets), (torch.float32, as_float32(case.targets))):
        inputs = leaves(case, dtype)
        total = head_loss(*inputs, targets, spec_of(loss), 3).total
        results.append([total, *torch.autograd.grad(total, inputs)])
    for exact, single in zip(*results, strict=True):
        assert (single.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("loss", [*TWO_SIDED, MIXTURE, "renormalised_kl", "label_residual_kl"], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_gradient_equals_finite_differences(
    new_case: Callable[..., Any], loss: str | dict[str, float], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = new_case(rows=3, vocabulary=9, width=2, k=3, temperature=temperature)
    weigh, frozen = adaptive._gaps, []

    def as_at_first(student_RJ: Tensor, teacher_RJ: Tensor) -> tuple[Tensor, Tensor]:
        """Constant weights: no gradient flows through adaptive KL's weights, so differences must not change them."""
        frozen.append(weigh(student_RJ, teacher_RJ))
        return frozen[0]

    monkeypatch.setattr(adaptive, "_gaps", as_at_first)
    assert_finite_differences(leaves(case), case.targets, loss, temperature)


@pytest.mark.parametrize("changes", [{"scale": 0.3}, {"soft_cap": 2.0}, {"scale": 1.5, "soft_cap": 3.0}])
def test_scale_and_soft_cap_equal_the_dense_oracle(new_case: Callable[..., Any], changes: dict[str, float]) -> None:
    case = new_case()
    inputs = leaves(case)
    got = head_loss(*inputs, case.targets, spec_of("forward_kl", **changes, kd=0.0), 2)
    cap = changes.get("soft_cap", torch.inf)
    logits_TV = changes.get("scale", 1.0) * (inputs[0] @ inputs[1].T + inputs[2])
    capped_TV = logits_TV if cap == torch.inf else cap * torch.tanh(logits_TV / cap)
    ce_T = torch.nn.functional.cross_entropy(capped_TV, case.targets.label_T, reduction="none")
    total = 0.4 * (case.targets.weight_T * ce_T).sum()
    torch.testing.assert_close(got.total, total)
    torch.testing.assert_close(torch.autograd.grad(got.total, inputs), torch.autograd.grad(total, inputs))


def test_targets_that_sum_to_one_give_the_weighted_cross_entropy(new_case: Callable[..., Any]) -> None:
    case = new_case()
    weight_TK = torch.softmax(case.targets.entry_logweight_TK, dim=1)
    targets = replace(
        case.targets,
        entry_logweight_TK=weight_TK.log(),
        tail_logmass_T=torch.full_like(case.targets.tail_logmass_T, -torch.inf),
        mode=TargetMode.UNBIASED,
    )
    inputs = leaves(case)
    got = head_loss(*inputs, targets, spec_of("forward_kl"), 3)
    logprob_TV = torch.log_softmax(inputs[0] @ inputs[1].T + inputs[2], dim=1)
    kd_T = -(weight_TK * logprob_TV.gather(1, targets.entry_id_TK)).sum(1)
    ce_T = -logprob_TV.gather(1, targets.label_T[:, None]).squeeze(1)
    total = (targets.weight_T * (0.7 * kd_T + 0.4 * ce_T)).sum()
    torch.testing.assert_close(got.total, total)
    torch.testing.assert_close(torch.autograd.grad(got.total, inputs), torch.autograd.grad(total, inputs))


def test_the_weighted_cross_entropy_s_gradient_equals_finite_differences(new_case: Callable[..., Any]) -> None:
    case = new_case(rows=3, vocabulary=9, width=2, k=3)
    targets = replace(
        case.targets,
        entry_logweight_TK=torch.log_softmax(case.targets.entry_logweight_TK, dim=1),
        tail_logmass_T=torch.full_like(case.targets.tail_logmass_T, -torch.inf),
        mode=TargetMode.UNBIASED,
    )
    assert_finite_differences(leaves(case), targets, "forward_kl")


@pytest.mark.parametrize("loss", ["renormalised_kl", "label_residual_kl"])
def test_targets_for_comparison_equal_the_dense_computation(new_case: Callable[..., Any], loss: str) -> None:
    case = new_case()
    targets, rows = case.targets, torch.arange(case.targets.rows)
    p_TV = torch.zeros_like(case.teacher_logprob_TV)
    p_TV.scatter_add_(1, targets.entry_id_TK, targets.entry_logweight_TK.exp())
    if loss == "renormalised_kl":
        p_TV /= p_TV.sum(dim=1, keepdim=True)
    else:
        p_TV[rows, targets.label_T] += 1.0 - p_TV.sum(dim=1)
    inputs = leaves(case)
    q_TV = torch.softmax(inputs[0] @ inputs[1].T + inputs[2], dim=1)
    kept_TV = p_TV > 0
    kd_T = (p_TV * (torch.where(kept_TV, p_TV, 1.0).log() - q_TV.log())).sum(dim=1)
    ce_T = -q_TV[rows, targets.label_T].log()
    total = (targets.weight_T * (0.7 * kd_T + 0.4 * ce_T)).sum()
    got = head_loss(*inputs, targets, spec_of(loss), 3)
    torch.testing.assert_close(got.total, total)
    torch.testing.assert_close(torch.autograd.grad(got.total, inputs), torch.autograd.grad(total, inputs))


def test_sampled_targets_give_the_gradient_of_the_full_distribution_on_average(new_case: Callable[..., Any]) -> None:
    case = new_case(rows=3)
    p_TV, draws, runs = case.teacher_logprob_TV.exp(), 16, 400
    weight_T = torch.ones(3, dtype=torch.float64)
    leaf = case.hidden_TD.requires_grad_()
    g = torch.Generator().manual_seed(1)
    gradients = []
    for _ in range(runs):
        drawn_TU = torch.multinomial(p_TV, draws, replacement=True, generator=g)
        one_TU = torch.full(drawn_TU.shape, 1 / draws, dtype=torch.float64)
        share_TV = torch.zeros_like(p_TV).scatter_add_(1, drawn_TU, one_TU)
        share_TK, id_TK = share_TV.sort(dim=1, descending=True, stable=True)
        targets = replace(
            case.targets,
            weight_T=weight_T,
            entry_id_TK=id_TK.masked_fill(share_TK == 0, 0),
            entry_logweight_TK=share_TK.log(),
            tail_logmass_T=torch.full((3,), -torch.inf).double(),
            mode=TargetMode.SAMPLED,
        )
        total = head_loss(leaf, case.weight_VD, case.bias_V, targets, HeadSpec(), 2).total
        gradients.append(torch.autograd.grad(total, leaf)[0])
    q_TV = torch.softmax(leaf.detach() @ case.weight_VD.T + case.bias_V, dim=1)
    exact_TD = (q_TV - p_TV) @ case.weight_VD
    sigma_TD = torch.stack(gradients).std(dim=0) / runs**0.5
    assert ((torch.stack(gradients).mean(dim=0) - exact_TD).abs() <= 4.5 * sigma_TD).all()
    assert (sigma_TD <= 0.2 * exact_TD.abs().max()).all()


def test_the_tail_gradient_is_accurate_in_float32_when_the_kept_ids_have_nearly_all_mass(
    new_case: Callable[..., Any],
) -> None:
    case = new_case(rows=2, vocabulary=40, width=3, k=4)
    targets = replace(case.targets, tail_logmass_T=torch.full((2,), -18.0, dtype=torch.float64))
    bias_V = torch.zeros(40, dtype=torch.float64)
    for row in range(2):
        bias_V[targets.entry_id_TK[row]] = 18.0
    zeros = torch.zeros_like(case.hidden_TD)
    gradients = []
    for dtype, moved in ((torch.float64, targets), (torch.float32, as_float32(targets))):
        leaf = bias_V.to(dtype).requires_grad_()
        got = head_loss(zeros.to(dtype), case.weight_VD.to(dtype), leaf, moved, HeadSpec(), 8)
        gradients.append(torch.autograd.grad(got.total, leaf)[0].double())
    rest = torch.ones(40, dtype=torch.bool)
    rest[targets.entry_id_TK.flatten()] = False
    torch.testing.assert_close(gradients[1][rest], gradients[0][rest], rtol=1e-4, atol=0.0)


def test_bfloat16_hidden_states_give_bfloat16_gradients_near_the_oracle(new_case: Callable[..., Any]) -> None:
    case = new_case(rows=6, vocabulary=30, width=8)
    total, _, _ = dense_total(case, "forward_kl", 1.0, exact := leaves(case))
    bf16 = leaves(case, torch.bfloat16)
    got = head_loss(*bf16, as_float32(case.targets), spec_of("forward_kl"), 4)
    gradients = torch.autograd.grad(got.total, bf16)
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 3
    for got_gradient, gradient in zip(gradients, torch.autograd.grad(total, exact), strict=True):
        assert (got_gradient.double() - gradient).norm() <= 0.05 * gradient.norm()


def test_rows_of_weight_zero_are_ignored_even_when_not_finite(new_case: Callable[..., Any]) -> None:
    case = new_case()
    hidden_TD = case.hidden_TD.clone()
    hidden_TD[case.targets.weight_T == 0] = torch.nan
    leaf = hidden_TD.requires_grad_()
    got = head_loss(leaf, case.weight_VD, case.bias_V, case.targets, spec_of("forward_kl"), 3)
    got.total.backward()
    assert got.total.isfinite()
    assert leaf.grad is not None
    assert leaf.grad[case.targets.weight_T == 0].eq(0).all()


def test_all_rows_of_weight_zero_give_zero_and_zero_gradients(new_case: Callable[..., Any]) -> None:
    case = new_case()
    targets = replace(case.targets, weight_T=torch.zeros_like(case.targets.weight_T))
    inputs = leaves(case)
    got = head_loss(*inputs, targets, spec_of("forward_kl"), 3)
    assert got.total == 0
    assert all(g.eq(0).all() for g in torch.autograd.grad(got.total, inputs))


def test_kd_weight_applies_to_the_distillation_loss_only(new_case: Callable[..., Any]) -> None:
    case = new_case()
    kd_weight_T = torch.rand(case.targets.rows, dtype=torch.float64)
    got = head_loss(*leaves(case), replace(case.targets, kd_weight_T=kd_weight_T), spec_of("forward_kl"), 3)
    weighted = replace(case.targets, weight_T=case.targets.weight_T * kd_weight_T)
    plain = head_loss(*leaves(case), case.targets, spec_of("forward_kl"), 3)
    assert got.parts["ce"] == plain.parts["ce"]
    expected = head_loss(*leaves(case), weighted, spec_of("forward_kl"), 3)
    torch.testing.assert_close(got.parts["kd"], expected.parts["kd"])


def test_cross_entropy_alone_needs_no_entries(new_case: Callable[..., Any]) -> None:
    case = new_case()
    no_id_TK, no_logweight_TK = case.targets.entry_id_TK[:, :0], case.targets.entry_logweight_TK[:, :0]
    bare = replace(case.targets, entry_id_TK=no_id_TK, entry_logweight_TK=no_logweight_TK)
    inputs = leaves(case)
    got = head_loss(*inputs, bare, HeadSpec(kd=0.0, ce=1.0), 3)
    logits_TV = inputs[0] @ inputs[1].T + inputs[2]
    ce_T = torch.nn.functional.cross_entropy(logits_TV, bare.label_T, reduction="none")
    torch.testing.assert_close(got.total, (bare.weight_T * ce_T).sum())


def test_rows_per_chunk_follow_the_byte_limit() -> None:
    like = torch.zeros(())
    assert HeadSpec(chunk_bytes=2**20).rows_per_chunk(512, vocabulary=4096, like=like) == 64
    assert HeadSpec(chunk_bytes=2**20).rows_per_chunk(512, vocabulary=4096, like=like.double()) == 32
    assert HeadSpec(chunk_bytes=2**20).rows_per_chunk(8, vocabulary=4096, like=like) == 8
    assert HeadSpec(chunk_bytes=1).rows_per_chunk(512, vocabulary=4096, like=like) == 16
    assert HeadSpec().rows_per_chunk(512, vocabulary=151936, like=like) == 220


def test_a_second_backward_pass_raises(new_case: Callable[..., Any]) -> None:
    case = new_case()
    got = head_loss(*leaves(case), case.targets, spec_of("forward_kl"), 3)
    got.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        got.total.backward()


def test_no_gradient_is_computed_under_no_grad(new_case: Callable[..., Any]) -> None:
    case = new_case()
    with torch.no_grad():
        got = head_loss(*leaves(case), case.targets, spec_of("forward_kl"), 3)
    total, _, _ = dense_total(case, "forward_kl", 1.0, leaves(case))
    assert not got.total.requires_grad
    torch.testing.assert_close(got.total, total.detach())
