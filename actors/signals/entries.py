"""Which entries of a row are kept, and what each of them weighs: one function a target mode, over a block of rows.

`unbiased` is head-exact threshold sampling: with the threshold t that solves `sum_v min(1, p_v / t) = k`, tokens above
t keep their probability, and k minus their number are drawn from the others by systematic sampling, each carrying t.
The expectation of what is kept is p itself, and no sort of the vocabulary is needed: the head lies within the k best.
`sampled` counts draws with replacement.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.contracts import CaptureSpec, TargetMode

_TIES = 32
"""Entries fetched beyond k, so that ties at the border are settled without another pass over the row."""
_GROUP = 16
"""Columns that share a maximum while the best are looked for."""


@dataclass(frozen=True, slots=True)
class Entries:
    """Kept entries of R rows, in the order of the contract."""

    id_RK: Tensor
    logweight_RK: Tensor
    """-inf for padding, whose id is 0."""
    kept_id_RK: Tensor
    """Ids that do not belong to the tail; padding repeats a row's first."""
    missed_R: Tensor | None = None
    """Share of the target that the entries leave out, where it is not the tail's probability."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of logits: `x` is their distance from the row's largest, `e` its exponential.

    The k largest stand apart, so that every sum over a row is one over the rest, and one over a few: that of a tail is
    then had without another pass, and without a difference of nearly equal sums.
    """

    x_RV: Tensor
    rest_e_RV: Tensor
    """`e`, but 0 at the best."""
    best_RK: Tensor
    """Ids of the k largest, in the order of the contract; K = 0 under `sampled`, which has no use for them."""
    best_e_RK: Tensor
    rest_R: Tensor
    """Sum of `rest_e`."""
    total_R: Tensor
    """Sum of all of `e`: what turns it into probabilities."""

    def logprob_at(self, id_RK: Tensor) -> Tensor:
        """[R, K] log-probabilities of these ids, rounded once."""
        return self.x_RV.gather(1, id_RK) - self.total_R.log()[:, None]


def choose(block: Block, spec: CaptureSpec, uniform_RU: Tensor | None) -> Entries:
    """Entries of each row. `uniform_RU` holds the random numbers of a sampling mode."""
    if spec.mode is TargetMode.SAMPLED:
        return _draw(block.rest_e_RV, spec, _needed(uniform_RU))
    logprob_RK = block.logprob_at(block.best_RK)
    if spec.mode is TargetMode.UNBIASED:
        return _threshold_sample(block, logprob_RK, _needed(uniform_RU))
    return prefix(block.best_RK, logprob_RK, spec)


def prefix(best_RK: Tensor, logprob_RK: Tensor, spec: CaptureSpec) -> Entries:
    """`topk` and `topp`: the first of the best, as many as the spec says, of those that can occur at all."""
    kept_RK = logprob_RK > -torch.inf
    if spec.mode is TargetMode.TOPP:
        weight_RK = logprob_RK.double().exp()
        rank_K = torch.arange(spec.k, device=logprob_RK.device)
        kept_RK &= (weight_RK.cumsum(1) - weight_RK < spec.top_p) | (rank_K < spec.min_k)
    return _padded(best_RK, logprob_RK, kept_RK)


def _padded(id_RK: Tensor, logweight_RK: Tensor, real_RK: Tensor, missed_R: Tensor | None = None) -> Entries:
    return Entries(
        id_RK=torch.where(real_RK, id_RK, 0),
        logweight_RK=torch.where(real_RK, logweight_RK, -torch.inf),
        kept_id_RK=torch.where(real_RK, id_RK, id_RK[:, :1]),
        missed_R=missed_R,
    )


def _needed(uniform_RU: Tensor | None) -> Tensor:
    if uniform_RU is None:
        raise ValueError("uniform_RU: expected random numbers for a sampling mode, got None")
    return uniform_RU


def best_ids(logits_RV: Tensor, k: int) -> Tensor:
    """[R, k] ids of the largest of each row, largest first, ties by rising id."""
    fetched = min(k + _TIES, logits_RV.shape[1])
    value_RF, id_RF = _largest(logits_RV, fetched)
    id_RF, by_id_RF = id_RF.sort(dim=1)
    value_RF, by_value_RF = value_RF.gather(1, by_id_RF).sort(dim=1, descending=True, stable=True)
    id_RK = id_RF.gather(1, by_value_RF)[:, :k]
    unsettled_R = value_RF[:, -1] == value_RF[:, k - 1]
    if fetched < logits_RV.shape[1] and bool(unsettled_R.any()):
        whole = logits_RV[unsettled_R].sort(dim=1, descending=True, stable=True).indices
        id_RK[unsettled_R] = whole[:, :k]
    return id_RK


def _largest(logits_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and ids of the largest `count`, in any order, ties broken in any way.

    Columns a stride apart form a group. Whatever is among the largest lies in one of the `count` groups with the
    largest maxima, or has an equal there: only their columns, and the few that no group holds, are searched.
    """
    stride = logits_RV.shape[1] // _GROUP
    if stride < 4 * count:
        value_RF, id_RF = logits_RV.topk(count, dim=1, sorted=False)
        return value_RF, id_RF
    grouped_RV = logits_RV[:, : stride * _GROUP].view(len(logits_RV), _GROUP, stride)
    group_RF = grouped_RV.amax(1).topk(count, dim=1, sorted=False).indices
    group_value_RF = grouped_RV.gather(2, group_RF[:, None].expand(-1, _GROUP, -1)).flatten(1)
    left_out_RF = logits_RV[:, stride * _GROUP :]
    value_RF, at_RF = torch.cat([group_value_RF, left_out_RF], dim=1).topk(count, dim=1, sorted=False)
    id_RF = group_RF.gather(1, at_RF % count) + at_RF // count * stride
    return value_RF, torch.where(at_RF < count * _GROUP, id_RF, at_RF + (stride - count) * _GROUP)


def _threshold_sample(block: Block, logprob_RK: Tensor, uniform_R1: Tensor) -> Entries:
    best_RK, k = block.best_RK, block.best_RK.shape[1]
    column_K = torch.arange(k, device=best_RK.device)
    p_RK = logprob_RK.double().exp()
    others_RV = block.rest_e_RV / block.total_R.double()[:, None]
    threshold_R1 = _threshold(p_RK, others_RV.sum(1))
    sure_RK = (p_RK >= threshold_R1 * (1 - 1e-12)) & (p_RK > 0)
    others_RV.scatter_(1, best_RK, torch.where(sure_RK, 0.0, p_RK))
    edge_RV = others_RV.cumsum_(1)
    sure_R1 = sure_RK.sum(1, keepdim=True)
    wanted_R1 = torch.where(edge_RV[:, -1:] > 0, k - sure_R1, 0)
    drawn_RK = _systematic(edge_RV, uniform_R1, wanted_R1, column_K)
    is_sure_RK = column_K < sure_R1
    id_RK = torch.where(is_sure_RK, best_RK, drawn_RK.gather(1, (column_K - sure_R1).clamp(min=0)))
    weight_RK = torch.where(is_sure_RK, logprob_RK.double(), threshold_R1.log())
    return _padded(id_RK, weight_RK, column_K < sure_R1 + wanted_R1, missed_R=torch.zeros_like(block.total_R))


def _threshold(p_RK: Tensor, rest_R: Tensor) -> Tensor:
    """[R, 1] t of `sum_v min(1, p_v / t) = k`, from the k best and the mass of the rest."""
    k = p_RK.shape[1]
    left_RK = p_RK.flip(1).cumsum(1).flip(1) + rest_R[:, None]  # left[m]: what the m best leave
    open_K = k - torch.arange(k, device=p_RK.device)
    first_R1 = (p_RK * open_K <= left_RK).int().argmax(1, keepdim=True)
    return left_RK.gather(1, first_R1) / open_K[first_R1]


def _systematic(edge_RV: Tensor, uniform_R1: Tensor, wanted_R1: Tensor, column_K: Tensor) -> Tensor:
    """Ids at `u, u+1, ...` of the cumulated mass, scaled so that `wanted` of them fit. Columns beyond are arbitrary."""
    last_R1 = edge_RV[:, -1:]
    at_RK = (uniform_R1 + column_K) / wanted_R1.clamp(min=1) * last_R1
    return torch.searchsorted(edge_RV, torch.minimum(at_RK, last_R1)).clamp(max=edge_RV.shape[1] - 1)


def _draw(e_RV: Tensor, spec: CaptureSpec, uniform_RU: Tensor) -> Entries:
    edge_RV = e_RV.double().cumsum(1)
    drawn_RU = torch.searchsorted(edge_RV, uniform_RU * edge_RV[:, -1:]).clamp(max=e_RV.shape[1] - 1)
    drawn_RU = drawn_RU.sort(dim=1).values
    fresh_RU = torch.ones_like(drawn_RU)
    fresh_RU[:, 1:] = drawn_RU[:, 1:] != drawn_RU[:, :-1]
    slot_RU = fresh_RU.cumsum(1) - 1
    count_RU = torch.zeros_like(drawn_RU).scatter_add_(1, slot_RU, torch.ones_like(drawn_RU))
    id_RU = torch.zeros_like(drawn_RU).scatter_(1, slot_RU, drawn_RU)
    count_RU, order_RU = count_RU.sort(dim=1, descending=True, stable=True)
    pad = (0, max(0, spec.k - spec.draws))
    id_RK = torch.nn.functional.pad(id_RU.gather(1, order_RU), pad)[:, : spec.k]
    count_RK = torch.nn.functional.pad(count_RU, pad)[:, : spec.k]
    missed_R = (spec.draws - count_RK.sum(1)).to(e_RV.dtype) / spec.draws
    return _padded(id_RK, (count_RK.double() / spec.draws).log(), count_RK > 0, missed_R)
