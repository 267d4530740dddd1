"""Fuse the targets of several teachers that share the student's tokenizer into one.

    mix     sum_m w_m p_m over the union of the kept ids
    select  each row: the target of the teacher with the highest probability of the label
    route   each row: the target of the teacher assigned to the document's domain

A mixture is linear in the targets: from `unbiased` or `sampled` entries it is an unbiased estimate too, and sums to 1.
From `topk` entries, the mass of an id that teacher b did not keep is unknown, at most min(b's smallest entry, b's
tail). It stays in the mixture's tail bucket, so the mixture underestimates such an id by at most w_b times that bound.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.config.training import FusionSpec
from pipeline.contracts import TargetMode
from pipeline.errors import RecipeError
from student.data.targets import BUCKET_MODES, LINEAR_MODES, Targets


def fuse(targets: Mapping[str, Targets], spec: FusionSpec, domains: Sequence[str | None]) -> Targets:
    """Fuse several teachers' targets of the same T rows.

    `targets` is keyed by teacher's name, all at the temperature of training (`Targets.at_temperature`); `domains` holds
    the domain of each row's document. Labels and weights are the first teacher's. Raises RecipeError for incompatible
    modes, weights that leave a row without a teacher, and a domain without a route.
    """
    if len(targets) == 1:
        return next(iter(targets.values()))
    if len({one.temperature for one in targets.values()}) > 1:
        raise ValueError("fuse: expected all targets at one temperature")
    mode = _common_mode({name: one.mode for name, one in targets.items()})
    if spec.how == "mix":
        return _mix(list(targets.values()), _mixture_weights(list(targets), spec, domains), mode)
    by_teacher = list(targets.values())
    if spec.how == "route":
        return _choose(by_teacher, _routes(list(targets), spec, domains).to(by_teacher[0].label_T.device), mode)
    best_T = torch.stack([one.teacher_label_logprob_T for one in by_teacher]).argmax(dim=0)
    return _choose(by_teacher, best_T, mode)


def check_fusion(spec: FusionSpec, mode_of: Mapping[str, TargetMode], domains: Collection[str | None]) -> None:
    """Raise before training the RecipeError that `fuse` would raise in one of its steps.

    `mode_of` is keyed by teacher's name; `domains` holds every domain of the training documents.
    """
    if len(mode_of) == 1:
        return
    names = list(mode_of)
    _common_mode(mode_of)
    if spec.how == "mix":
        _mixture_weights(names, spec, list(domains))
    if spec.how == "route":
        _routes(names, spec, list(domains))


def _common_mode(mode_of: Mapping[str, TargetMode]) -> TargetMode:
    """Mode of the fused target: the weakest of the sources' modes."""
    modes = set(mode_of.values())
    if len(modes) == 1:
        return modes.pop()
    if modes <= BUCKET_MODES:
        return TargetMode.TOPP
    if modes <= LINEAR_MODES:
        return TargetMode.SAMPLED
    named = ", ".join(f"{name}: {mode}" for name, mode in mode_of.items())
    raise RecipeError(
        f"training.fusion: targets with a tail bucket and sampled targets do not mix, got {named}; "
        "capture all of them as topk or topp, or all as unbiased or sampled"
    )


def _mixture_weights(names: Sequence[str], spec: FusionSpec, domains: Sequence[str | None]) -> Tensor:
    """float64 [M, T], columns sum to 1. A key `domain:teacher` of `weights` takes precedence over `teacher`."""
    by_domain: dict[str | None, list[float]] = {
        domain: [
            spec.weights.get(f"{domain}:{name}", spec.weights.get(name, 0.0 if spec.weights else 1.0)) for name in names
        ]
        for domain in dict.fromkeys(domains)
    }
    for domain, weights in by_domain.items():
        if min(weights) < 0.0 or sum(weights) <= 0.0:
            raise RecipeError(
                f"training.fusion.weights: expected weights of at least 0 and a sum above 0 for {', '.join(names)} "
                f"in domain {domain}, got {weights}"
            )
    weight_MT = torch.tensor([by_domain[domain] for domain in domains], dtype=torch.float64).T
    return weight_MT / weight_MT.sum(dim=0)


def _routes(names: Sequence[str], spec: FusionSpec, domains: Sequence[str | None]) -> Tensor:
    """int64 [T]: index of each row's teacher."""
    unrouted = sorted({str(domain) for domain in domains if domain not in spec.by_domain})
    unknown = sorted(set(spec.by_domain.values()) - set(names))
    if unrouted or unknown:
        got = f"no teacher for domain {', '.join(unrouted)}" if unrouted else f"unknown teacher {', '.join(unknown)}"
        raise RecipeError(
            f"training.fusion.by_domain: {got}; expected one of {', '.join(names)} for every domain of the corpus"
        )
    return torch.tensor([names.index(spec.by_domain[str(domain)]) for domain in domains], dtype=torch.int64)


def _choose(targets: Sequence[Targets], which_T: Tensor, mode: TargetMode) -> Targets:
    """Take row t from teacher `which_T[t]`."""
    width = max(one.entry_id_TK.shape[1] for one in targets)

    def rows(values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values))[which_T, torch.arange(len(which_T), device=which_T.device)]

    return replace(
        targets[0],
        entry_id_TK=rows([_padded(one.entry_id_TK, width, 0) for one in targets]),
        entry_logweight_TK=rows([_padded(one.entry_logweight_TK, width, -torch.inf) for one in targets]),
        tail_logmass_T=rows([one.tail_logmass_T for one in targets]),
        teacher_label_logprob_T=rows([one.teacher_label_logprob_T for one in targets]),
        teacher_entropy_T=rows([one.teacher_entropy_T for one in targets]),
        log_partition_T=None,
        mode=mode,
    )


def _padded(value_TK: Tensor, width: int, padding: float) -> Tensor:
    return torch.nn.functional.pad(value_TK, (0, width - value_TK.shape[1]), value=padding)


def _mix(targets: Sequence[Targets], weight_MT: Tensor, mode: TargetMode) -> Targets:
    """sum_m w_m p_m. The entropy is sum_m w_m H(p_m), a lower bound of the mixture's (concavity of H)."""
    weight_MT = weight_MT.to(targets[0].label_T.device)
    logweight_MT = weight_MT.log()
    id_TK, logweight_TK = _union(
        torch.cat([one.entry_id_TK for one in targets], dim=1),
        torch.cat([one.entry_logweight_TK + lw[:, None] for one, lw in zip(targets, logweight_MT, strict=True)], dim=1),
    )

    def mixed_log(values: Sequence[Tensor]) -> Tensor:
        return torch.logsumexp(torch.stack(list(values)) + logweight_MT, dim=0).to(values[0].dtype)

    entropy_MT = torch.stack([one.teacher_entropy_T for one in targets])
    return replace(
        targets[0],
        entry_id_TK=id_TK,
        entry_logweight_TK=logweight_TK.to(targets[0].entry_logweight_TK.dtype),
        tail_logmass_T=mixed_log([one.tail_logmass_T for one in targets]),
        teacher_label_logprob_T=mixed_log([one.teacher_label_logprob_T for one in targets]),
        teacher_entropy_T=(weight_MT * entropy_MT).sum(dim=0).to(entropy_MT.dtype),
        log_partition_T=None,
        mode=mode,
    )


def _union(id_TF: Tensor, logweight_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Merge F candidates per row into K entries: weights of equal ids summed, in the order of `pipeline.contracts`."""
    # Padding gets the largest id, so that it is not merged with a real entry of id 0.
    largest = torch.iinfo(torch.int64).max
    id_TF, order_TF = torch.sort(id_TF.masked_fill(logweight_TF == -torch.inf, largest), dim=1, stable=True)
    mass_TF = logweight_TF.double().gather(1, order_TF).exp()
    is_new_TF = torch.ones_like(id_TF, dtype=torch.bool)
    is_new_TF[:, 1:] = id_TF[:, 1:] != id_TF[:, :-1]
    slot_TF = is_new_TF.cumsum(dim=1) - 1
    mass_TK = torch.zeros_like(mass_TF).scatter_add_(1, slot_TF, mass_TF)
    id_TK = torch.full_like(id_TF, largest).scatter_(1, slot_TF, id_TF)
    # Ids rise, so a stable sort by falling weight leaves ties with the lower id first.
    mass_TK, order_TK = torch.sort(mass_TK, dim=1, descending=True, stable=True)
    id_TK = id_TK.gather(1, order_TK).masked_fill(mass_TK == 0.0, 0)
    width = max(1, int((mass_TK > 0.0).sum(dim=1).max())) if mass_TK.numel() else 0
    return id_TK[:, :width], mass_TK[:, :width].log()
