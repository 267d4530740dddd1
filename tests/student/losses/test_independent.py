"""Our losses against independent implementations: TRL's generalised JSD and Liger's fused distillation loss.

With the full vocabulary as buckets and an empty tail the values must be equal. TRL and Liger define beta 0 and 1 as
forward and reverse KL, which are divergences of their own here. Neither multiplies by the square of the temperature.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.training import DistributionSpec
from student.head.chunked import HeadSpec, head_loss
from student.losses.divergences.buckets import ABSENT, DivergenceSettings
from student.losses.divergences.forward_kl import forward_kl
from student.losses.divergences.jensen_shannon import jensen_shannon
from student.losses.divergences.reverse_kl import reverse_kl

ROWS, VOCABULARY = 6, 31


@pytest.fixture(scope="module")
def trl_jsd() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        module = pytest.importorskip("trl.experimental.gkd", reason="trl is not installed", exc_type=ImportError)
    return module.GKDTrainer.generalized_jsd_loss


@pytest.fixture(scope="module")
def liger_fused_jsd() -> Any:
    module = pytest.importorskip(
        "liger_kernel.chunked_loss.jsd_loss", reason="liger-kernel is not installed", exc_type=ImportError
    )
    return module.LigerFusedLinearJSDFunction


def logits(seed: int) -> Tensor:
    return 2.0 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def buckets(logits_TV: Tensor) -> Tensor:
    """The full vocabulary, and a tail of mass 0."""
    return torch.nn.functional.pad(torch.log_softmax(logits_TV, dim=1), (0, 1), value=ABSENT)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_values_and_gradients_equal_trl(trl_jsd: Callable[..., Tensor], beta: float) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    ours = {0.0: forward_kl, 1.0: reverse_kl}.get(beta, jensen_shannon)
    total = ours(buckets(student), buckets(teacher), DivergenceSettings(beta=beta)).sum()
    reference = trl_jsd(student[None], teacher[None], beta=beta, reduction="sum")
    torch.testing.assert_close(total, reference)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (total, reference)))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.3, 0.5])
def test_the_head_equals_the_fused_distillation_loss_of_liger(
    liger_fused_jsd: Any, new_case: Callable[..., Any], temperature: float, beta: float
) -> None:
    case = new_case(rows=ROWS, vocabulary=VOCABULARY, k=VOCABULARY, temperature=temperature)
    targets = case.targets.rows_at(torch.arange(1, ROWS))  # row 0 of a case has padding
    targets.weight_T.fill_(1.0)
    distribution = DistributionSpec(loss="jensen_shannon", beta=beta, temperature=temperature)
    spec = HeadSpec(kd=0.7 / temperature**2, ce=0.3, distribution=distribution)
    inputs = [x.clone().requires_grad_() for x in (case.hidden_TD[1:], case.weight_VD, case.bias_V)]
    ours = head_loss(*inputs, targets, spec, 2).total
    hidden_TD, weight_VD, bias_V = inputs
    reference = liger_fused_jsd.apply(
        *(hidden_TD, weight_VD, case.teacher_logprob_TV[1:], torch.eye(VOCABULARY, dtype=torch.float64)),
        *(targets.label_T, bias_V, None, 0.3, 0.7, beta, -100, temperature, False, 2),
    )
    reference = reference[0] if isinstance(reference, tuple) else reference
    torch.testing.assert_close(ours / targets.rows, reference, check_dtype=False, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(loss, inputs) for loss in (ours / targets.rows, reference))
    for gradient, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, expected, check_dtype=False, rtol=1e-5, atol=1e-6)
