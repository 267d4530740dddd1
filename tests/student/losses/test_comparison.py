from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from student.losses.divergences.comparison import label_residual, renormalised


def dense(targets: Any, vocabulary: int) -> torch.Tensor:
    mass_TK = targets.entry_logweight_TK.exp()
    return torch.zeros(targets.rows, vocabulary).double().scatter_add_(1, targets.entry_id_TK, mass_TK)


def test_renormalised_entries_sum_to_one_and_keep_their_ratios(new_case: Callable[..., Any]) -> None:
    targets = new_case().targets
    got = renormalised(targets)
    mass_TV = dense(targets, 23)
    torch.testing.assert_close(dense(got, 23), mass_TV / mass_TV.sum(1, keepdim=True))
    assert got.tail_logmass_T.eq(-torch.inf).all()


def test_the_tail_mass_is_added_to_the_label_kept_or_not(new_case: Callable[..., Any]) -> None:
    targets = new_case().targets
    label_T = targets.label_T.clone()
    label_T[1] = targets.entry_id_TK[1, 2]
    label_T[2] = next(v for v in range(23) if v not in targets.entry_id_TK[2])
    targets = replace(targets, label_T=label_T)
    expected = dense(targets, 23)
    for row in range(targets.rows):
        expected[row, label_T[row]] += targets.tail_logmass_T[row].exp()
    got = label_residual(targets)
    torch.testing.assert_close(dense(got, 23), expected)
    assert got.entry_id_TK.shape == (7, 5)
    assert (got.entry_logweight_TK[:, :-1] >= got.entry_logweight_TK[:, 1:]).all()
