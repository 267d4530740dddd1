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


@dataclass(frozen=True, slots=True)
class Entries:
    """Kept entries of R rows, in the order of the contract."""

    id_RK: Tensor
    logweight_RK: Tensor
    """-inf for padding, whose id is 0."""
    kept_id_RK: Tensor
    """Ids that do not belong to the tail; where padded, `kept_RK` is False."""
    kept_RK: Tensor
    missed_R: Tensor | None = None
    """Share of the target that the entries leave out, where it is not the tail's probability."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of logits and their softmax. What leaves the block as a log-probability is rounded once."""

    logits_RV: Tensor
    """In the dtype that the model gave."""
    x_RV: Tensor
    """The same numbers in the dtype that sums are taken in."""
    p_RV: Tensor
    peak_R: Tensor
    spread_R: Tensor
    """`lse - peak`: small, where lse itself would round away the digits of a confident row."""

    @classmethod
    def of(cls, logits_RV: Tensor) -> "Block":
        """The block of these logits: float64 stays float64, all else becomes float32."""
        x_RV = logits_RV if logits_RV.dtype is torch.float64 else logits_RV.float()
        p_RV = torch.softmax(x_RV, dim=-1)
        return cls(logits_RV, x_RV, p_RV, peak_R=x_RV.amax(-1), spread_R=-p_RV.amax(-1).log())

    def logprob_at(self, id_RK: Tensor) -> Tensor:
        """[R, K] log-probabilities of these ids."""
        return self.x_RV.gather(1, id_RK) - self.peak_R[:, None] - self.spread_R[:, None]


def choose(block: Block, spec: CaptureSpec, uniform_RU: Tensor | None) -> Entries:
    """Entries of each row. `uniform_RU` holds the random numbers of a sampling mode."""
    if spec.mode is TargetMode.SAMPLED:
        return _draw(block.p_RV, spec, _needed(uniform_RU))
    id_RK = _best(block.logits_RV, spec.k)
    logprob_RK = block.logprob_at(id_RK)
    if spec.mode is TargetMode.UNBIASED:
        return _threshold_sample(block.p_RV, id_RK, logprob_RK, _needed(uniform_RU))
    kept_RK = torch.ones_like(id_RK, dtype=torch.bool)
    if spec.mode is TargetMode.TOPP:
        weight_RK = logprob_RK.double().exp()
        rank_K = torch.arange(spec.k, device=id_RK.device)
        kept_RK = (weight_RK.cumsum(1) - weight_RK < spec.top_p) | (rank_K < spec.min_k)
    return _padded(id_RK, logprob_RK, kept_RK)


def _padded(id_RK: Tensor, logweight_RK: Tensor, real_RK: Tensor) -> Entries:
    real_RK = real_RK & (logweight_RK > -torch.inf)
    return Entries(
        id_RK=torch.where(real_RK, id_RK, 0),
        logweight_RK=torch.where(real_RK, logweight_RK, -torch.inf),
        kept_id_RK=id_RK,
        kept_RK=real_RK,
    )


def _needed(uniform_RU: Tensor | None) -> Tensor:
    if uniform_RU is None:
        raise ValueError("uniform_RU: expected random numbers for a sampling mode, got None")
    return uniform_RU


def _best(logits_RV: Tensor, k: int) -> Tensor:
    """Ids of the k largest of each row, largest first, ties by rising id."""
    fetched = min(k + _TIES, logits_RV.shape[1])
    value_RF, id_RF = logits_RV.topk(fetched, dim=1, sorted=False)
    id_RF, by_id_RF = id_RF.sort(dim=1)
    value_RF, by_value_RF = value_RF.gather(1, by_id_RF).sort(dim=1, descending=True, stable=True)
    id_RK = id_RF.gather(1, by_value_RF)[:, :k]
    unsettled_R = value_RF[:, -1] == value_RF[:, k - 1]
    if fetched < logits_RV.shape[1] and bool(unsettled_R.any()):
        whole = logits_RV[unsettled_R].sort(dim=1, descending=True, stable=True).indices
        id_RK[unsettled_R] = whole[:, :k]
    return id_RK


def _threshold_sample(p_RV: Tensor, best_RK: Tensor, logprob_RK: Tensor, uniform_R1: Tensor) -> Entries:
    k = best_RK.shape[1]
    column_K = torch.arange(k, device=p_RV.device)
    p_RK = logprob_RK.double().exp()
    others_RV = p_RV.scatter(1, best_RK, 0.0).double()
    threshold_R1 = _threshold(p_RK, others_RV.sum(1))
    sure_RK = (p_RK >= threshold_R1 * (1 - 1e-12)) & (p_RK > 0)
    others_RV.scatter_(1, best_RK, torch.where(sure_RK, 0.0, p_RK))
    edge_RV = others_RV.cumsum_(1)
    sure_R1 = sure_RK.sum(1, keepdim=True)
    last_R1 = edge_RV[:, -1:]
    wanted_R1 = torch.where(last_R1 > 0, k - sure_R1, 0)
    drawn_RK = _systematic(edge_RV, uniform_R1, wanted_R1, column_K)
    tail_column_RK = (column_K - sure_R1).clamp(min=0)
    is_sure_RK = column_K < sure_R1
    id_RK = torch.where(is_sure_RK, best_RK, drawn_RK.gather(1, tail_column_RK))
    weight_RK = torch.where(is_sure_RK, logprob_RK.double(), threshold_R1.log())
    entries = _padded(id_RK, weight_RK, column_K < sure_R1 + wanted_R1)
    return Entries(entries.id_RK, entries.logweight_RK, id_RK, entries.kept_RK, missed_R=p_RV.new_zeros(len(p_RV)))


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


def _draw(p_RV: Tensor, spec: CaptureSpec, uniform_RN: Tensor) -> Entries:
    edge_RV = p_RV.double().cumsum(1)
    drawn_RN = torch.searchsorted(edge_RV, uniform_RN * edge_RV[:, -1:]).clamp(max=p_RV.shape[1] - 1)
    drawn_RN = drawn_RN.sort(dim=1).values
    fresh_RN = torch.ones_like(drawn_RN)
    fresh_RN[:, 1:] = drawn_RN[:, 1:] != drawn_RN[:, :-1]
    slot_RN = fresh_RN.cumsum(1) - 1
    count_RN = torch.zeros_like(drawn_RN).scatter_add_(1, slot_RN, torch.ones_like(drawn_RN))
    id_RN = torch.zeros_like(drawn_RN).scatter_(1, slot_RN, drawn_RN)
    count_RN, order_RN = count_RN.sort(dim=1, descending=True, stable=True)
    pad = (0, max(0, spec.k - spec.draws))
    id_RK = torch.nn.functional.pad(id_RN.gather(1, order_RN), pad)[:, : spec.k]
    count_RK = torch.nn.functional.pad(count_RN, pad)[:, : spec.k]
    entries = _padded(id_RK, (count_RK.double() / spec.draws).log(), count_RK > 0)
    missed_R = (spec.draws - count_RK.sum(1)).to(p_RV.dtype) / spec.draws
    return Entries(entries.id_RK, entries.logweight_RK, id_RK, entries.kept_RK, missed_R)
