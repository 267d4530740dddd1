"""Selection of the kept entries and their weights, one function for each target mode, for a block of rows.

- `topk`, `topp`: the first entries by falling probability, with their probabilities.
- `unbiased`: threshold sampling with an exact head. The threshold t solves `sum_v min(1, p_v / t) = k`. The m tokens
  with p_v >= t (the head) are kept with weight p_v; k - m of the others are drawn by systematic sampling with inclusion
  probability p_v / t, and get weight t. So the expected weight of every token is p_v. The head is among the k largest,
  so the vocabulary need not be sorted. Sources: Duffield, Lund and Thorup 2005, "Learn more, sample less" (threshold);
  Cohen et al. 2009, "Stream sampling for variance-optimal estimation of subset sums" (t for a fixed k); Madow 1949,
  "On the theory of systematic sampling, II".
- `sampled`: random sampling knowledge distillation (RS-KD; Anshumann et al. 2025, arXiv:2503.16870). The weight of an
  id is its share of `draws` draws with replacement.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.contracts import CaptureSpec, TargetMode

_EXTRA = 32
"""Candidates fetched beyond k, so that most ties at rank k are resolved without sorting the row."""
_GROUP = 16
"""Columns of a group whose maximum is compared first in the search for the k largest."""


@dataclass(frozen=True, slots=True)
class Entries:
    """Kept entries of R rows, in the order of `pipeline.contracts`."""

    id_RK: Tensor
    logweight_RK: Tensor
    """-inf for padding, whose id is 0."""
    kept_id_RK: Tensor
    """Ids to exclude from the tail; padding repeats the row's first id."""
    omitted_R: Tensor | None = None
    """Sampling modes: the weight that the entries leave out; None if that is the tail's probability."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block of R rows of logits z: x = z - max z, e = exp(x).

    The k largest ("best") are kept separately from the rest, so that a sum over the row is a sum over the rest plus one
    over k numbers. The tail's sum then needs no further pass, and no difference of nearly equal sums.
    """

    x_RV: Tensor
    rest_e_RV: Tensor
    """e, with 0 at the k largest."""
    best_RK: Tensor
    """Ids of the k largest, largest first, ties by rising id; K = 0 in mode `sampled`, which does not use them."""
    best_e_RK: Tensor
    rest_R: Tensor
    """Sum of `rest_e_RV`."""
    total_R: Tensor
    """Sum of e over the row: p = e / total."""

    def logprob_at(self, id_RK: Tensor) -> Tensor:
        """Return the [R, K] log-probabilities of these ids."""
        return self.x_RV.gather(1, id_RK) - self.total_R.log()[:, None]


def select_entries(block: Block, spec: CaptureSpec, uniform_RU: Tensor | None) -> Entries:
    """Select the entries of each row by the spec's mode. Sampling modes need `uniform_RU`, numbers in (0, 1]."""
    if spec.mode is TargetMode.SAMPLED:
        return _sample_with_replacement(block.rest_e_RV, spec, _required(uniform_RU))
    logprob_RK = block.logprob_at(block.best_RK)
    if spec.mode is TargetMode.UNBIASED:
        return _threshold_sample(block, logprob_RK, _required(uniform_RU))
    return prefix_entries(block.best_RK, logprob_RK, spec)


def prefix_entries(best_RK: Tensor, logprob_RK: Tensor, spec: CaptureSpec) -> Entries:
    """Select entries for `topk` and `topp`: a prefix of the k largest, without tokens of probability 0."""
    kept_RK = logprob_RK > -torch.inf
    if spec.mode is TargetMode.TOPP:
        weight_RK = logprob_RK.double().exp()
        rank_K = torch.arange(spec.k, device=logprob_RK.device)
        kept_RK &= (weight_RK.cumsum(1) - weight_RK < spec.top_p) | (rank_K < spec.min_k)
    return _with_padding(best_RK, logprob_RK, kept_RK)


def _with_padding(id_RK: Tensor, logweight_RK: Tensor, real_RK: Tensor, omitted_R: Tensor | None = None) -> Entries:
    return Entries(
        id_RK=torch.where(real_RK, id_RK, 0),
        logweight_RK=torch.where(real_RK, logweight_RK, -torch.inf),
        kept_id_RK=torch.where(real_RK, id_RK, id_RK[:, :1]),
        omitted_R=omitted_R,
    )


def _required(uniform_RU: Tensor | None) -> Tensor:
    if uniform_RU is None:
        raise ValueError("uniform_RU: expected random numbers for a sampling mode, got None")
    return uniform_RU


def best_ids(logits_RV: Tensor, k: int) -> Tensor:
    """Return the [R, K] ids of the k largest logits of each row, largest first, ties by rising id."""
    count = min(k + _EXTRA, logits_RV.shape[1])
    value_RF, id_RF = _largest(logits_RV, count)
    id_RF, by_id_RF = id_RF.sort(dim=1)
    value_RF, by_value_RF = value_RF.gather(1, by_id_RF).sort(dim=1, descending=True, stable=True)
    id_RK = id_RF.gather(1, by_value_RF)[:, :k]
    tied_R = value_RF[:, -1] == value_RF[:, k - 1]
    if count < logits_RV.shape[1] and bool(tied_R.any()):
        id_RK[tied_R] = logits_RV[tied_R].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return id_RK


def _largest(logits_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return values and ids of the `count` largest, in any order, ties in any order; exact, like `torch.topk`.

    A group is _GROUP columns, a stride apart. The `count` groups with the largest maxima contain the `count` largest
    values (or equal ones), so only their columns and the last few columns, which are in no group, are searched.
    """
    stride = logits_RV.shape[1] // _GROUP
    if stride < 4 * count:
        value_RF, id_RF = logits_RV.topk(count, dim=1, sorted=False)
        return value_RF, id_RF
    grouped_RV = logits_RV[:, : stride * _GROUP].view(len(logits_RV), _GROUP, stride)
    group_RG = grouped_RV.amax(1).topk(count, dim=1, sorted=False).indices
    in_groups_RF = grouped_RV.gather(2, group_RG[:, None].expand(-1, _GROUP, -1)).flatten(1)
    ungrouped_RF = logits_RV[:, stride * _GROUP :]
    value_RF, place_RF = torch.cat([in_groups_RF, ungrouped_RF], dim=1).topk(count, dim=1, sorted=False)
    id_RF = group_RG.gather(1, place_RF % count) + place_RF // count * stride
    return value_RF, torch.where(place_RF < count * _GROUP, id_RF, place_RF + (stride - count) * _GROUP)


def _threshold_sample(block: Block, logprob_RK: Tensor, uniform_R1: Tensor) -> Entries:
    best_RK, k = block.best_RK, block.best_RK.shape[1]
    column_K = torch.arange(k, device=best_RK.device)
    p_RK = logprob_RK.double().exp()
    p_RV = block.rest_e_RV / block.total_R.double()[:, None]
    threshold_R1 = _threshold(p_RK, p_RV.sum(1))
    exact_RK = (p_RK >= threshold_R1 * (1 - 1e-12)) & (p_RK > 0)
    p_RV.scatter_(1, best_RK, torch.where(exact_RK, 0.0, p_RK))
    cumulative_RV = p_RV.cumsum_(1)
    exact_R1 = exact_RK.sum(1, keepdim=True)
    draws_R1 = torch.where(cumulative_RV[:, -1:] > 0, k - exact_R1, 0)
    drawn_RK = _systematic_sample(cumulative_RV, uniform_R1, draws_R1, column_K)
    in_head_RK = column_K < exact_R1
    id_RK = torch.where(in_head_RK, best_RK, drawn_RK.gather(1, (column_K - exact_R1).clamp(min=0)))
    weight_RK = torch.where(in_head_RK, logprob_RK.double(), threshold_R1.log())
    return _with_padding(id_RK, weight_RK, column_K < exact_R1 + draws_R1, omitted_R=torch.zeros_like(block.total_R))


def _threshold(p_RK: Tensor, rest_R: Tensor) -> Tensor:
    """Return the [R, 1] t with `sum_v min(1, p_v / t) = k`, from the k largest p and the sum of the rest.

    If the m largest are kept exactly, t = (mass without these) / (k - m). The right m is the least for which the next
    probability is at most t.
    """
    k = p_RK.shape[1]
    mass_RK = p_RK.flip(1).cumsum(1).flip(1) + rest_R[:, None]  # column m: mass without the m largest
    draws_K = k - torch.arange(k, device=p_RK.device)
    m_R1 = (p_RK * draws_K <= mass_RK).int().argmax(1, keepdim=True)
    return mass_RK.gather(1, m_R1) / draws_K[m_R1]


def _systematic_sample(cumulative_RV: Tensor, uniform_R1: Tensor, draws_R1: Tensor, column_K: Tensor) -> Tensor:
    """Return ids where the cumulative mass, scaled to `draws`, passes u, u + 1, ...; only `draws` columns are valid."""
    mass_R1 = cumulative_RV[:, -1:]
    point_RK = (uniform_R1 + column_K) / draws_R1.clamp(min=1) * mass_R1
    return torch.searchsorted(cumulative_RV, torch.minimum(point_RK, mass_R1)).clamp(max=cumulative_RV.shape[1] - 1)


def _sample_with_replacement(e_RV: Tensor, spec: CaptureSpec, uniform_RU: Tensor) -> Entries:
    cumulative_RV = e_RV.double().cumsum(1)
    drawn_RU = torch.searchsorted(cumulative_RV, uniform_RU * cumulative_RV[:, -1:]).clamp(max=e_RV.shape[1] - 1)
    drawn_RU = drawn_RU.sort(dim=1).values
    is_new_RU = torch.ones_like(drawn_RU)
    is_new_RU[:, 1:] = drawn_RU[:, 1:] != drawn_RU[:, :-1]
    slot_RU = is_new_RU.cumsum(1) - 1
    count_RU = torch.zeros_like(drawn_RU).scatter_add_(1, slot_RU, torch.ones_like(drawn_RU))
    id_RU = torch.zeros_like(drawn_RU).scatter_(1, slot_RU, drawn_RU)
    count_RU, by_count_RU = count_RU.sort(dim=1, descending=True, stable=True)
    pad = (0, max(0, spec.k - spec.draws))
    id_RK = torch.nn.functional.pad(id_RU.gather(1, by_count_RU), pad)[:, : spec.k]
    count_RK = torch.nn.functional.pad(count_RU, pad)[:, : spec.k]
    omitted_R = (spec.draws - count_RK.sum(1)).to(e_RV.dtype) / spec.draws
    return _with_padding(id_RK, (count_RK.double() / spec.draws).log(), count_RK > 0, omitted_R)
