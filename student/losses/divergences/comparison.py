"""Two targets of the literature that are biased. They exist so that a run can show it: do not train with them.

Both are truncations followed by the plain forward KL, so they change the targets, not the loss.
"""

from dataclasses import replace

import torch
from torch import Tensor

from student.data.targets import Targets


def renormalised(targets: Targets) -> Targets:
    """Kept entries divided by their mass: p_i / a. Inflates the head and drives the tail to 0."""
    logmass_T1 = torch.logsumexp(targets.entry_logweight_TK, dim=1, keepdim=True)
    return replace(
        targets,
        entry_logweight_TK=targets.entry_logweight_TK - logmass_T1,
        tail_logmass_T=torch.full_like(targets.tail_logmass_T, -torch.inf),
    )


def label_residual(targets: Targets) -> Targets:
    """All that the entries leave out is given to the label: p_y += 1 - a. One more entry where y is not kept."""
    is_label_TK = (targets.entry_id_TK == targets.label_T[:, None]) & targets.entry_logweight_TK.isfinite()
    kept_T1 = is_label_TK.any(dim=1, keepdim=True)
    tail_T1 = targets.tail_logmass_T[:, None]
    raised_TK = torch.where(
        is_label_TK, torch.logaddexp(targets.entry_logweight_TK, tail_T1), targets.entry_logweight_TK
    )
    extra_T1 = torch.where(kept_T1, -torch.inf, tail_T1)
    return _sorted(
        replace(targets, tail_logmass_T=torch.full_like(targets.tail_logmass_T, -torch.inf)),
        torch.cat([targets.entry_id_TK, targets.label_T[:, None]], dim=1),
        torch.cat([raised_TK, extra_T1], dim=1),
    )


def _sorted(targets: Targets, id_TK: Tensor, logweight_TK: Tensor) -> Targets:
    """Entries by falling weight, padding last."""
    logweight_TK, order_TK = torch.sort(logweight_TK, dim=1, descending=True, stable=True)
    return replace(targets, entry_id_TK=id_TK.gather(1, order_TK), entry_logweight_TK=logweight_TK)
