import torch

from student.evaluation.measure import MetricAccumulator


def test_a_model_that_is_its_teacher_is_accepted_always_and_no_more_than_that() -> None:
    sums = MetricAccumulator()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        logprob_RV = (3 * torch.randn(16, 49_152, generator=generator)).log_softmax(dim=1)
        assert logprob_RV.exp().sum(dim=1).max() > 1.0  # as float32 adds them up
        sums.add(logprob_RV, logprob_RV, torch.zeros(16, dtype=torch.long))
    sums.bytes = 1
    measures = sums.measures()
    assert 1.0 - 1e-5 < measures.acceptance <= 1.0
    assert (measures.kl_to_teacher, measures.top1_agreement) == (0.0, 1.0)


def test_acceptance_is_the_mass_that_both_give() -> None:
    model_RV, teacher_RV = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.1, 0.3, 0.6]]).log()
    sums = MetricAccumulator()
    sums.add(model_RV, teacher_RV, torch.tensor([0]))
    assert abs(sums.accepted - 0.6) < 1e-6
