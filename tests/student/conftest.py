"""Random targets and the dense float64 oracle that every sparse computation is held against."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pipeline.contracts import TargetMode
from student.targets import Targets

torch.set_num_threads(1)


@dataclass(frozen=True)
class Case:
    """A teacher's whole distribution, the targets cut from it, and a student head."""

    teacher_logprob_TV: Tensor
    targets: Targets
    hidden_TD: Tensor
    weight_VD: Tensor
    bias_V: Tensor


def make_case(
    rows: int = 7, vocabulary: int = 23, width: int = 5, k: int = 4, seed: int = 0, temperature: float = 1.0
) -> Case:
    """Top-k targets of a random teacher, float64, with a padded row and rows of weight 0."""
    g = torch.Generator().manual_seed(seed)
    logprob_TV = torch.log_softmax(3.0 * torch.randn(rows, vocabulary, generator=g, dtype=torch.float64), dim=1)
    logweight_TK, id_TK = logprob_TV.topk(k, dim=1)
    if k > 1:
        logweight_TK[0, -1], id_TK[0, -1] = -torch.inf, 0
    kept_TV = torch.zeros(rows, vocabulary, dtype=torch.bool).scatter_(1, id_TK, True)
    if k > 1:
        kept_TV[0] = False
        kept_TV[0, id_TK[0, :-1]] = True
    tail_T = logprob_TV.masked_fill(kept_TV, -torch.inf).logsumexp(dim=1)
    label_T = torch.randint(vocabulary, (rows,), generator=g)
    weight_T = torch.rand(rows, generator=g, dtype=torch.float64) + 0.5
    weight_T[rows // 2] = 0.0
    targets = Targets(
        label_T=label_T,
        weight_T=weight_T,
        entry_id_TK=id_TK,
        entry_logweight_TK=logweight_TK,
        tail_logmass_T=tail_T,
        teacher_label_logprob_T=logprob_TV.gather(1, label_T[:, None]).squeeze(1),
        teacher_entropy_T=-(logprob_TV.exp() * logprob_TV).sum(dim=1),
        log_partition_T=None if temperature == 1.0 else torch.logsumexp(logprob_TV / temperature, dim=1),
        mode=TargetMode.TOPK,
    )
    hidden_TD = torch.randn(rows, width, generator=g, dtype=torch.float64)
    weight_VD = torch.randn(vocabulary, width, generator=g, dtype=torch.float64)
    return Case(logprob_TV, targets, hidden_TD, weight_VD, torch.randn(vocabulary, generator=g, dtype=torch.float64))


@pytest.fixture(scope="session")
def new_case() -> Callable[..., Case]:
    return make_case
