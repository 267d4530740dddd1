"""Two biased targets from the literature, as baselines to compare against. Not for training.

Both truncate the teacher and then use the forward KL, so they transform the targets, not the divergence.
"""

from dataclasses import replace

import torch
from torch import Tensor

from student.data.targets import Targets


def renormalised(targets: Targets) -> Targets:
    """Divide the kept entries by their mass a: p_i / a. Overestimates the head and trains the tail to 0."""
    logmass_T1 = torch.logsumexp(targets.entry_logweight_TK, dim=1, keepdim=True)
    return replace(
        targets,
        entry_logweight_TK=targets.entry_logweight_TK - logmass_T1,
        tail_logmass_T=torch.full_like(targets.tail_logmass_T, -torch.inf),
    )


def label_residual(targets: Targets) -> Targets:
    """Add the tail's mass to the label: p_y += 1 - a. K grows by 1, for labels that were not kept."""
    is_label_TK = (targets.entry_id_TK == targets.label_T[:, None]) & targets.entry_logweight_TK.isfinite()
    label_kept_T1 = is_label_TK.any(dim=1, keepdim=True)
    tail_T1 = targets.tail_logmass_T[:, None]
    raised_TK = torch.where(
        is_label_TK, torch.logaddexp(targets.entry_logweight_TK, tail_T1), targets.entry_logweight_TK
    )
    extra_T1 = torch.where(label_kept_T1, -torch.inf, tail_T1)
    return _sorted(
        replace(targets, tail_logmass_T=torch.full_like(targets.tail_logmass_T, -torch.inf)),
        torch.cat([targets.entry_id_TK, targets.label_T[:, None]], dim=1),
        torch.cat([raised_TK, extra_T1], dim=1),
    )


def _sorted(targets: Targets, id_TK: Tensor, logweight_TK: Tensor) -> Targets:
    """Replace the entries by these, sorted by falling weight, padding last."""
    logweight_TK, order_TK = torch.sort(logweight_TK, dim=1, descending=True, stable=True)
    return replace(targets, entry_id_TK=id_TK.gather(1, order_TK), entry_logweight_TK=logweight_TK)
