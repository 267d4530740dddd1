import json
from dataclasses import replace

import numpy as np
import pytest

from pipeline.bfloat16 import to_bfloat16
from pipeline.cache.reader import CacheReader
from pipeline.cache.storage import layout
from pipeline.cache.verify.audit import audit_cache
from pipeline.cache.verify.audit_targets import Head, Target, bucket_kl, log_softmax, simulated_targets, state_gradient
from pipeline.cache.verify.verify_cache import verify_cache
from pipeline.contracts import CaptureSpec, LmHead
from pipeline.errors import AdmissionError

random = np.random.default_rng(0)


def tiny_head(vocabulary=40, width=8, **fields):
    return LmHead(to_bfloat16(random.standard_normal((vocabulary, width), np.float32)), **fields)


def kl_to(target, q_RV):
    """The forward KL of a target with one bucket, without the terms that do not depend on q."""
    kept_RV = np.zeros_like(q_RV)
    np.put_along_axis(kept_RV, target.entry_id_RK, target.weight_RK, axis=1)
    rest_R = 1 - np.where(kept_RV > 0, q_RV, 0).sum(axis=1)
    return -(kept_RV * np.log(q_RV)).sum() - (target.tail_R * np.log(rest_R)).sum()


@pytest.mark.parametrize("fields", [{}, {"scale": 0.5, "soft_cap": 3.0, "bias_V": np.full(40, 0.1, np.float32)}])
@pytest.mark.parametrize("tail", [0.0, 0.2])
def test_the_state_gradient_is_that_of_the_targets_kl(fields, tail):
    head = Head(tiny_head(**fields))
    state_RD = random.standard_normal((3, 8)).astype(np.float32)
    ids = np.array([[1, 5, 9]] * 3)
    weights = np.tile(np.array([0.5, 0.3, 0.2], np.float32) * np.float32(1 - tail), (3, 1))
    target = Target("x", ids, weights, np.full(3, tail, np.float32))

    def loss(states):
        return kl_to(target, np.exp(log_softmax(head.logits(states)).astype(np.float64)))

    logits_RV = head.logits(state_RD)
    q_RV, slope = np.exp(log_softmax(logits_RV)), head.slope(logits_RV)
    q_state_RD = (q_RV if slope is None else q_RV * slope) @ head.weight_VD
    got = state_gradient(target, q_RV, q_state_RD, head, slope)
    for position, channel in ((0, 0), (1, 3), (2, 7)):
        step = np.zeros_like(state_RD)
        step[position, channel] = 1e-2
        numeric = (loss(state_RD + step) - loss(state_RD - step)) / 2e-2
        assert got[position, channel] == pytest.approx(numeric, abs=3e-3)


def test_samples_have_k_entries_that_sum_to_1_and_are_unbiased():
    p_V = random.dirichlet(np.full(30, 0.3)).astype(np.float32)
    p_RV = np.tile(p_V, (4000, 1))
    targets = {t.name: t for t in simulated_targets(p_RV, CaptureSpec(k=6), np.random.default_rng(1))}
    for name in ("unbiased", "sampled"):
        target = targets[name]
        assert target.weight_RK.sum(axis=1) == pytest.approx(1.0, abs=1e-5)
        mean_V = np.zeros(30)
        np.add.at(mean_V, target.entry_id_RK.ravel(), target.weight_RK.ravel() / len(p_RV))
        assert np.abs(mean_V - p_V).max() < 0.015
    assert all(len(set(row)) == 6 for row in targets["unbiased"].entry_id_RK)


def test_topk_keeps_the_largest_and_the_tail_the_rest():
    p_RV = random.dirichlet(np.full(30, 0.3), size=5).astype(np.float32)
    topk, _, renormalised, *_ = simulated_targets(p_RV, CaptureSpec(k=4), np.random.default_rng(0))
    assert topk.entry_id_RK.tolist() == np.argsort(-p_RV, axis=1, kind="stable")[:, :4].tolist()
    assert topk.weight_RK.sum(axis=1) + topk.tail_R == pytest.approx(1.0)
    assert renormalised.weight_RK.sum(axis=1) == pytest.approx(1.0)
    assert bucket_kl(topk, p_RV) == pytest.approx(0.0, abs=1e-6)
    wrong = replace(topk, weight_RK=topk.weight_RK * np.float32(0.5), tail_R=1 - topk.weight_RK.sum(axis=1) * 0.5)
    assert (bucket_kl(wrong, p_RV) > 0.1).all()


def test_topp_keeps_the_shortest_prefix_that_reaches_its_mass():
    p_RV = np.tile(np.array([0.5, 0.25, 0.15, 0.06, 0.04], np.float32), (2, 1))
    for top_p, min_k, kept in ((0.4, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.4, 3, 3), (0.999, 1, 4)):
        _, topp, *_ = simulated_targets(p_RV, CaptureSpec(k=4, top_p=top_p, min_k=min_k), np.random.default_rng(0))
        assert (topp.weight_RK > 0).sum(axis=1).tolist() == [kept, kept]
        assert topp.weight_RK.sum(axis=1) + topp.tail_R == pytest.approx(1.0)


def test_the_dummy_teachers_cache_agrees_with_its_exact_distribution(make_cache):
    audit = audit_cache(CacheReader.open(make_cache(audit=0.5)))
    stored, exact, *_ = audit.targets
    assert stored.name == "stored topk"
    assert audit.label_error < 0.01
    assert audit.entropy_error < 0.01
    assert stored.kl < 1e-3
    assert stored.mass == pytest.approx(exact.mass, abs=1e-6)
    for got, expected in zip(stored.gradients, exact.gradients, strict=True):
        assert got.angle_deg == pytest.approx(expected.angle_deg, abs=2.0)
        assert got.norm_ratio == pytest.approx(expected.norm_ratio, abs=0.05)


@pytest.mark.parametrize("mode", ["topp", "unbiased", "sampled"])
def test_every_mode_is_audited_with_the_others_for_comparison(make_cache, mode):
    audit = audit_cache(CacheReader.open(make_cache(mode=mode)), max_positions=64)
    names = [target.name for target in audit.targets]
    assert names == [f"stored {mode}", "topk with tail", "topp with tail", "topk renormalised", "unbiased", "sampled"]
    assert audit.positions == 64
    assert (audit.targets[0].kl is None) == (mode != "topp")
    assert [target.name for target in audit.targets[1:] if target.kl is not None] == [
        "topk with tail",
        "topp with tail",
    ]
    if mode == "topp":
        assert audit.targets[0].entries == pytest.approx(audit.targets[2].entries, abs=0.1)
        assert audit.targets[0].mass == pytest.approx(audit.targets[2].mass, abs=0.01)
    if mode == "unbiased":
        assert audit.targets[0].gradients[1].norm_ratio == pytest.approx(1.0, abs=0.2)


def test_entries_with_wrong_ids_have_a_large_kl(make_cache):
    def with_other_ids(rows):
        return [replace(row, signals=replace(row.signals, entry_id_TK=row.signals.entry_id_TK + 1)) for row in rows]

    unchanged = audit_cache(CacheReader.open(make_cache())).targets[0].kl
    assert audit_cache(CacheReader.open(make_cache("changed", change=with_other_ids))).targets[0].kl > 100 * unchanged


def test_a_cache_without_audited_sequences_or_lm_head_cannot_be_audited(make_cache):
    store = make_cache(audit=0.0, corpus={"held_out": 0.0})
    with pytest.raises(AdmissionError, match=r"has no audited sequence; set capture\.audit above 0"):
        audit_cache(CacheReader.open(store))
    store.delete(layout.LM_HEAD)
    with pytest.raises(AdmissionError, match="exports no LM head"):
        audit_cache(CacheReader.open(store))


def test_verify_prints_the_audit_of_an_undamaged_cache(make_cache):
    store = make_cache()
    report = verify_cache(store, audit=True)
    assert "stored topk" in str(report)
    assert json.loads(json.dumps(report.as_json()))["audit"]["targets"][0]["name"] == "stored topk"
    store.put(layout.MANIFEST_JSON, b"{}")
    assert verify_cache(store, audit=True).audit is None
