"""Part `liger`: Liger's fused distillation loss compared with plain cross-entropy, in the shapes of `student_head`.

Forward KL to a teacher's LM head of the same size, and cross-entropy. Liger compiles its loss with torch.compile for
each shape, which takes longer than all measurements of the head: so this is a part with a time limit of its own. The
teacher's hidden states and LM head count as memory, like the dense teacher in `student_head`.
"""

from importlib.util import find_spec

import torch

from gpu.records import Records
from gpu.student_head import CE, FULL, KD, TINY, Case, Sizes, case_name, ce_loss, make_case, shapes
from gpu.timing import interleaved_ms, peak_bytes


def run(records: Records, tiny: bool) -> None:
    """Measure every shape, in the order of `student_head`."""
    sizes = TINY if tiny else FULL
    if find_spec("liger_kernel") is None:
        records.figure("all", "liger", note="skipped: liger-kernel is not installed")
        return
    for dtype, width, vocabulary in shapes(sizes):
        with records.catch_failure(case_name(dtype, width, vocabulary)):
            _measure(records, make_case(dtype, width, vocabulary, sizes), sizes, compiled=not tiny)


def _measure(records: Records, case: Case, sizes: Sizes, *, compiled: bool) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(weight_hard_loss=CE, weight_soft_loss=KD, beta=0.0, compiled=compiled)  # forward KL
    teacher_TD = torch.randn_like(case.hidden_TD)
    teacher_VD = torch.randn_like(case.weight_VD).mul_(2 * case.weight_VD.shape[1] ** -0.5)
    variants = {
        "ce": case.step(lambda hidden, weight: ce_loss(hidden @ weight.T, case.targets)),
        "liger": case.step(lambda h, w: fused(h, w, teacher_TD, teacher_VD, case.targets.label_T)),
    }
    found_ms = interleaved_ms(variants, sizes.rounds)
    case.clear_gradients()
    records.figure(
        case.name, "liger", ms=found_ms["liger"], rate=sizes.tokens / (found_ms["liger"] / 1000), unit="tokens/s",
        ratio=found_ms["liger"] / found_ms["ce"], to="ce",
        peak_bytes=peak_bytes(variants["liger"]) + teacher_TD.nbytes + teacher_VD.nbytes,
    )  # fmt: skip
