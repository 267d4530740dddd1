import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from actors.signals import kernels_cpu, sums
from actors.signals.fused import fused_signals, is_fused
from actors.signals.reduce import eager_signals
from actors.signals.rows import RowSignals
from pipeline.contracts import CaptureSpec, TargetMode

DTYPES = [torch.float32, torch.bfloat16]
VALUES = [-np.inf, -3.5, -1.0, -0.0, 0.0, 2.0**-120, 0.25, 7.0, np.inf]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def logits_of(dtype, rows=24, vocabulary=50_003, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(rows, vocabulary, generator=generator) * scale).to(dtype)


@pytest.mark.parametrize("mode", list(TargetMode))
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_kernels_are_used_for_float32_and_bfloat16_in_topk_and_topp_only(mode, dtype):
    expected = mode in (TargetMode.TOPK, TargetMode.TOPP) and dtype in DTYPES
    assert is_fused(torch.device("cpu"), dtype, CaptureSpec(mode=mode)) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [TargetMode.TOPK, TargetMode.TOPP])
def test_both_reductions_agree_and_the_logits_are_restored(mode, dtype):
    spec = CaptureSpec(mode=mode, temperatures=(1.0, 2.0, 0.7, 1.25), any_temperature=True, boundary=True)
    logits_RV = logits_of(dtype)
    logits_RV[3, 7:] = -torch.inf  # fewer than k tokens have a probability above 0
    logits_RV[4] = 1.5  # all logits are equal
    label_R, boundary_V = torch.arange(24) % 7, torch.arange(50_003) % 3 == 0
    before_RV = logits_RV.clone()
    fused = fused_signals(logits_RV, label_R, spec, boundary_V)
    assert torch.equal(logits_RV, before_RV)
    eager = eager_signals(logits_RV, label_R, spec, None, boundary_V)
    for name in RowSignals.__dataclass_fields__:
        torch.testing.assert_close(getattr(fused, name), getattr(eager, name), rtol=2e-5, atol=2e-5, msg=name)


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from(DTYPES), st.integers(1, 4), st.integers(1, 400))
def test_best_ids_equal_a_stable_sort(data, dtype, rows, vocabulary):
    k = data.draw(st.integers(1, min(vocabulary, 70)))
    seed = data.draw(st.integers(0, 2**32 - 1))
    values = data.draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=len(VALUES), unique=True))
    rng = np.random.default_rng(seed)
    value_RV = rng.choice(values, (rows, vocabulary)) if rng.random() < 0.5 else rng.normal(0, 9, (rows, vocabulary))
    logits_RV = torch.from_numpy(value_RV).to(dtype)
    expected_RK = np.argsort(-logits_RV.double().numpy(), axis=1, kind="stable")[:, :k]
    assert kernels_cpu.best_ids(logits_RV, k).numpy().tolist() == expected_RK.tolist()


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -(2.0**-120), np.inf])
def test_bfloat16_and_float32_of_one_value_have_the_same_bits(value):
    number = torch.tensor([value])
    short, long = number.bfloat16().view(torch.uint16).numpy()[0], number.view(torch.uint32).numpy()[0]
    assert kernels_cpu._word(short) == kernels_cpu._word(long) == long
    compiled = njit(lambda bits: kernels_cpu._word(bits))
    assert compiled(short) == compiled(long) == long


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_and_columns_are_read_correctly(dtype):
    whole_RV = logits_of(dtype, rows=6, vocabulary=4_000)
    spec, peak_R = CaptureSpec(k=9), torch.full((6,), 12.0)
    for part_RV in (whole_RV[:, :3_001], whole_RV[:, 1::2], whole_RV[::2]):
        rows = len(part_RV)
        assert torch.equal(kernels_cpu.best_ids(part_RV, 9), kernels_cpu.best_ids(part_RV.clone(), 9))
        got, expected = (kernels_cpu.rest_sums(z, peak_R[:rows], spec, None) for z in (part_RV, part_RV.clone()))
        assert torch.equal(got, expected)
        assert got[:, sums.MASS].min() > 0


@pytest.mark.parametrize("shift", [0.0, 80.0, 169.0, 400.0])
def test_sums_equal_float64_down_to_the_least_normal_float32(shift):
    logits_RV, inverse = logits_of(torch.float32, rows=3, vocabulary=5_000) - shift, 1 / 1.25
    peak_R = torch.full((3,), 16.0)
    spec, starts_V = CaptureSpec(temperatures=(1.25,)), torch.arange(5_000) % 4 == 1
    got_RA = kernels_cpu.rest_sums(logits_RV, peak_R, spec, starts_V).double()
    x_RV = logits_RV.double() - 16
    e_RV, root_RV, power_RV = x_RV.exp(), (x_RV / 2).exp(), (x_RV * inverse).exp()
    terms = [e_RV, e_RV * x_RV, e_RV * starts_V, root_RV, root_RV * x_RV, power_RV]
    expected_RA = torch.stack([values_RV.sum(1) for values_RV in terms], dim=1)
    # Terms below the least normal float32, 1e-38, count as 0.
    torch.testing.assert_close(got_RA, expected_RA, rtol=2e-6, atol=1e-33)
    assert got_RA.shape[1] == sums.POWERS + 1


@pytest.mark.parametrize("rows", [2, 37])
def test_the_number_of_threads_changes_no_byte(threads, rows):
    logits_RV, spec = logits_of(torch.bfloat16, rows=rows, vocabulary=9_000), CaptureSpec(k=20, any_temperature=True)
    label_R = torch.arange(rows)
    threads(1)
    one_thread = fused_signals(logits_RV, label_R, spec, None)
    threads(3)
    three_threads = fused_signals(logits_RV, label_R, spec, None)
    for name in RowSignals.__dataclass_fields__:
        expected, got = getattr(one_thread, name), getattr(three_threads, name)
        assert expected is None or torch.equal(got, expected), name


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs os.sched_setaffinity")
def test_worker_threads_may_run_on_all_cores_of_the_process():
    cores = os.sched_getaffinity(0)
    started, done = threading.Event(), threading.Event()

    def stay():
        started.set()
        done.wait()

    other = threading.Thread(target=stay)
    other.start()
    started.wait()
    try:
        os.sched_setaffinity(0, {min(cores)})
        allowed = ThreadPoolExecutor(1, initializer=kernels_cpu._reset_affinity).submit(os.sched_getaffinity, 0)
        assert allowed.result() == cores
    finally:
        os.sched_setaffinity(0, cores)
        done.set()
        other.join()


def test_kernels_are_compiled_without_a_writable_cache_folder(monkeypatch):
    njit, uncached = kernels_cpu.njit, []

    def njit_without_cache(*, cache=False, **options):
        def decorate(function):
            if cache:
                uncached.append(function)
                raise RuntimeError("cannot cache function: no locator available")
            return njit(**options)(function)

        return decorate

    monkeypatch.setattr(kernels_cpu, "njit", njit_without_cache)

    @kernels_cpu._compiled()
    def twice(number):
        return 2 * number

    assert twice(21) == 42
    assert len(uncached) == len(twice.signatures) == 1
