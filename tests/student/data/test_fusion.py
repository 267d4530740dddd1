"""Fusion against dense mixtures, in expectation for sampled targets, and the choice of a teacher per row."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.config.training import FusionSpec
from pipeline.contracts import TargetMode
from pipeline.errors import RecipeError
from student.data.fusion import check_fusion, fuse
from student.data.targets import Targets

V = 23


def dense(targets: Targets, vocabulary: int = V) -> Tensor:
    """Mass of every id."""
    mass_TK = targets.entry_logweight_TK.double().exp()
    return torch.zeros(targets.rows, vocabulary).double().scatter_add_(1, targets.entry_id_TK, mass_TK)


def assert_contract(targets: Targets) -> None:
    """Falling weights, lower id first among equals, distinct ids, padding last with id 0."""
    for ids, logweights in zip(targets.entry_id_TK.tolist(), targets.entry_logweight_TK.tolist(), strict=True):
        real = [(i, w) for i, w in zip(ids, logweights, strict=True) if w > -np.inf]
        assert real == sorted(real, key=lambda entry: (-entry[1], entry[0]))
        assert len({i for i, _ in real}) == len(real)
        assert all(pair == (0, -np.inf) for pair in list(zip(ids, logweights, strict=True))[len(real) :])


def teachers(
    new_case: Callable[..., Any], k: tuple[int, ...] = (4, 6), rows: int = 7, seed: int = 0
) -> dict[str, Targets]:
    return {f"t{i}": new_case(rows=rows, vocabulary=V, k=kept, seed=seed + i).targets for i, kept in enumerate(k)}


@settings(max_examples=40, deadline=None)
@given(k=st.lists(st.integers(1, 20), min_size=2, max_size=4), seed=st.integers(0, 10**6), data=st.data())
def test_a_mixture_has_the_weighted_mass_of_every_id_and_of_the_tails(
    new_case: Callable[..., Any], k: list[int], seed: int, data: st.DataObject
) -> None:
    parts = teachers(new_case, tuple(k), rows=3, seed=seed)
    weights = {name: data.draw(st.floats(0.05, 4.0)) for name in parts}
    got = fuse(parts, FusionSpec(weights=weights), [None] * 3)
    total = sum(weights.values())
    expected = sum(weights[name] / total * dense(part) for name, part in parts.items())
    tail = sum(weights[name] / total * part.tail_logmass_T.exp() for name, part in parts.items())
    torch.testing.assert_close(dense(got), expected)
    torch.testing.assert_close(got.tail_logmass_T.exp(), tail)
    torch.testing.assert_close(dense(got).sum(1) + got.tail_logmass_T.exp(), torch.ones(3).double())
    assert_contract(got)
    assert got.mode is TargetMode.TOPK


def test_the_error_of_an_id_that_a_teacher_did_not_keep_is_within_its_bound(new_case: Callable[..., Any]) -> None:
    cases = [new_case(vocabulary=V, k=5, seed=seed) for seed in (1, 2)]
    got = fuse({"a": cases[0].targets, "b": cases[1].targets}, FusionSpec(), [None] * 7)
    true_TV = sum(0.5 * case.teacher_logprob_TV.exp() for case in cases)
    bound_T = torch.zeros(7).double()
    for case in cases:
        kept_TK = case.targets.entry_logweight_TK
        smallest_T = torch.where(kept_TK.isfinite(), kept_TK, torch.inf).min(dim=1).values
        bound_T += 0.5 * torch.minimum(smallest_T, case.targets.tail_logmass_T).exp()
    short_TV = (true_TV - dense(got)) * (dense(got) > 0)
    assert (short_TV >= -1e-12).all()
    assert (short_TV <= bound_T[:, None] + 1e-12).all()
    assert short_TV.max() > 0


def draw(logprob_TV: Tensor, draws: int, seed: int) -> Targets:
    """Ids drawn with replacement, weights draws/N: the `sampled` mode."""
    counts_TV = torch.stack(
        [
            torch.from_numpy(np.random.default_rng([seed, t]).multinomial(draws, row))
            for t, row in enumerate(_exact(logprob_TV))
        ]
    )
    weight_TK, id_TK = (counts_TV / draws).sort(dim=1, descending=True, stable=True)
    zeros_T = torch.zeros(len(logprob_TV)).double()
    logweight_TK = weight_TK.double().log()
    return Targets(
        label_T=zeros_T.long(),
        weight_T=zeros_T + 1,
        entry_id_TK=id_TK.masked_fill(logweight_TK == -torch.inf, 0),
        entry_logweight_TK=logweight_TK,
        tail_logmass_T=zeros_T - torch.inf,
        teacher_label_logprob_T=zeros_T - 1,
        teacher_entropy_T=zeros_T + 2,
        log_partition_T=None,
        mode=TargetMode.SAMPLED,
    )


def _exact(logprob_TV: Tensor) -> np.ndarray:
    p = logprob_TV.exp().numpy()
    return p / p.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("mode", [TargetMode.SAMPLED, TargetMode.UNBIASED])
def test_a_mixture_of_unbiased_targets_is_unbiased_and_sums_to_one(
    new_case: Callable[..., Any], mode: TargetMode
) -> None:
    teachers_TV = [new_case(rows=3, vocabulary=V, seed=seed).teacher_logprob_TV for seed in (1, 2)]
    runs, mean_TV = 1500, torch.zeros(3, V).double()
    for run in range(runs):
        first, second = (replace(draw(p, 8, 2 * run + i), mode=mode) for i, p in enumerate(teachers_TV))
        got = fuse({"a": first, "b": second}, FusionSpec(weights={"a": 1.0, "b": 3.0}), [None] * 3)
        mass_TV = dense(got)
        torch.testing.assert_close(mass_TV.sum(1), torch.ones(3).double())
        assert got.tail_logmass_T.eq(-torch.inf).all()
        mean_TV += mass_TV / runs
    true_TV = 0.25 * teachers_TV[0].exp() + 0.75 * teachers_TV[1].exp()
    assert got.mode is mode
    sigma_TV = (true_TV / 8 / runs).sqrt()
    assert ((mean_TV - true_TV).abs() <= 5 * sigma_TV + 1e-4).all()


def test_weights_may_differ_by_domain(new_case: Callable[..., Any]) -> None:
    parts = teachers(new_case, rows=3)
    spec = FusionSpec(weights={"t0": 1.0, "t1": 1.0, "law:t1": 0.0, "code:t0": 3.0})
    got = fuse(parts, spec, ["law", "code", None])
    share_T1 = torch.tensor([1.0, 0.75, 0.5]).double()[:, None]
    torch.testing.assert_close(dense(got), share_T1 * dense(parts["t0"]) + (1 - share_T1) * dense(parts["t1"]))


def test_scalars_of_a_mixture_follow_the_mixture(new_case: Callable[..., Any]) -> None:
    parts = teachers(new_case)
    got = fuse(parts, FusionSpec(), [None] * 7)
    label_T = sum(0.5 * part.teacher_label_logprob_T.exp() for part in parts.values()).log()
    torch.testing.assert_close(got.teacher_label_logprob_T, label_T)
    torch.testing.assert_close(got.teacher_entropy_T, sum(0.5 * part.teacher_entropy_T for part in parts.values()))


def test_select_takes_the_row_of_the_teacher_with_the_most_probable_label(new_case: Callable[..., Any]) -> None:
    parts = teachers(new_case, (4, 6, 2))
    got = fuse(parts, FusionSpec(how="select"), [None] * 7)
    names = list(parts)
    for row in range(7):
        best = max(names, key=lambda name: parts[name].teacher_label_logprob_T[row].item())
        torch.testing.assert_close(dense(got)[row], dense(parts[best])[row])
        assert got.tail_logmass_T[row] == parts[best].tail_logmass_T[row]
    assert_contract(got)


def test_route_takes_the_row_of_the_teacher_of_the_domain(new_case: Callable[..., Any]) -> None:
    parts = teachers(new_case, rows=4)
    spec = FusionSpec(how="route", by_domain={"law": "t1", "code": "t0"})
    got = fuse(parts, spec, ["law", "code", "code", "law"])
    expected = torch.stack([dense(parts[name])[row] for row, name in enumerate(("t1", "t0", "t0", "t1"))])
    torch.testing.assert_close(dense(got), expected)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (FusionSpec(how="route", by_domain={"law": "t0"}), r"no teacher for domain None, art; expected one of t0, t1"),
        (FusionSpec(how="route", by_domain={"art": "t0", "None": "t0", "law": "x"}), r"domain None"),
        (FusionSpec(weights={"t0": 0.0}), r"sum above 0 for t0, t1 in domain art"),
        (FusionSpec(weights={"t0": 2.0, "t1": -1.0}), r"at least 0"),
    ],
)
def test_a_row_without_a_teacher_is_refused(new_case: Callable[..., Any], spec: FusionSpec, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        fuse(teachers(new_case, rows=2), spec, ["art", None])


def test_a_route_to_an_unknown_teacher_is_refused(new_case: Callable[..., Any]) -> None:
    spec = FusionSpec(how="route", by_domain={"art": "t9"})
    with pytest.raises(RecipeError, match=r"unknown teacher t9; expected one of t0, t1"):
        fuse(teachers(new_case, rows=1), spec, ["art"])


@pytest.mark.parametrize(
    ("modes", "fused"),
    [
        ((TargetMode.TOPK, TargetMode.TOPP), TargetMode.TOPP),
        ((TargetMode.UNBIASED, TargetMode.SAMPLED), TargetMode.SAMPLED),
        ((TargetMode.UNBIASED, TargetMode.UNBIASED), TargetMode.UNBIASED),
    ],
)
def test_the_fused_mode_holds_for_every_source(
    new_case: Callable[..., Any], modes: tuple[TargetMode, TargetMode], fused: TargetMode
) -> None:
    parts = {n: replace(t, mode=m) for (n, t), m in zip(teachers(new_case).items(), modes, strict=True)}
    assert fuse(parts, FusionSpec(), [None] * 7).mode is fused


def test_bucket_and_sampled_targets_are_refused_together(new_case: Callable[..., Any]) -> None:
    parts = teachers(new_case)
    parts["t1"] = replace(parts["t1"], mode=TargetMode.UNBIASED)
    with pytest.raises(RecipeError, match="do not mix, got t0: topk, t1: unbiased"):
        fuse(parts, FusionSpec(), [None] * 7)


def test_one_teacher_needs_no_fusion(new_case: Callable[..., Any]) -> None:
    parts = teachers(new_case, (4,))
    assert fuse(parts, FusionSpec(how="route"), [None] * 7) is parts["t0"]


def test_targets_at_different_temperatures_are_refused(new_case: Callable[..., Any]) -> None:
    parts = teachers(new_case)
    parts["t1"] = replace(parts["t1"], temperature=2.0)
    with pytest.raises(ValueError, match="one temperature"):
        fuse(parts, FusionSpec(), [None] * 7)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (FusionSpec(weights={"prose:a": 1.0}), "expected weights of at least 0 and a sum above 0"),
        (FusionSpec(how="route", by_domain={"prose": "a"}), "no teacher for domain code"),
        (FusionSpec(how="route", by_domain={"prose": "a", "code": "c"}), "unknown teacher c"),
    ],
)
def test_check_fusion_raises_what_fuse_would_raise(spec: FusionSpec, message: str) -> None:
    modes = {"a": TargetMode.TOPK, "b": TargetMode.TOPP}
    with pytest.raises(RecipeError, match=message):
        check_fusion(spec, modes, {"prose", "code"})
    check_fusion(spec, {"a": TargetMode.TOPK}, {"prose", "code"})


def test_check_fusion_refuses_incompatible_modes() -> None:
    with pytest.raises(RecipeError, match="a: topk, b: unbiased"):
        check_fusion(FusionSpec(), {"a": TargetMode.TOPK, "b": TargetMode.UNBIASED}, {None})
    check_fusion(FusionSpec(), {"a": TargetMode.TOPK, "b": TargetMode.TOPP}, {None})
