import torch

from student.evaluation.measure import MetricAccumulator


def test_the_acceptance_rate_of_equal_models_is_1_and_not_more() -> None:
    sums = MetricAccumulator()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        logprob_RV = (3 * torch.randn(16, 49_152, generator=generator)).log_softmax(dim=1)
        assert logprob_RV.exp().sum(dim=1).max() > 1.0  # by float32 rounding
        sums.update(logprob_RV, logprob_RV, torch.zeros(16, dtype=torch.long))
    sums.bytes = 1
    metrics = sums.compute()
    assert 1.0 - 1e-5 < metrics.acceptance <= 1.0
    assert (metrics.kl_to_teacher, metrics.top1_agreement) == (0.0, 1.0)


def test_acceptance_is_the_sum_of_the_smaller_probabilities() -> None:
    model_RV, teacher_RV = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.1, 0.3, 0.6]]).log()
    sums = MetricAccumulator()
    sums.update(model_RV, teacher_RV, torch.tensor([0]))
    assert abs(sums.acceptance - 0.6) < 1e-6
