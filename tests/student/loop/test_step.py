from dataclasses import replace

import pytest
import torch

from pipeline.config import TrainingSpec
from pipeline.errors import TrainingError
from student.data.dataset import CacheDataset, make_batch_sampler
from student.data.prefetch import PrefetchLoader
from student.loop.checkpoint import Snapshot
from student.loop.distiller import PARTS, Coefficients, coefficients_at
from student.loop.optimizer import clip_grad_norm_, learning_rate_schedule, make_optimizer
from student.loop.resume import collect_state_dicts, load_state_dicts
from student.loop.setup import make_collate_spec, make_distiller
from student.loop.step import take_step
from student.loop.worker_group import WorkerGroup
from student.training_job import TrainingJob


class Training:
    """The objects of a training before its first step."""

    def __init__(self, run, arm="student", **changes):
        self.job = TrainingJob(run.recipe(**changes), "student", arm)
        self.caches = self.job.caches()
        self.dataset = CacheDataset(self.caches, "train")
        self.batch_sampler = make_batch_sampler(self.job, self.dataset)
        self.distiller = make_distiller(self.job, self.caches, self.dataset, self.batch_sampler, torch.device("cpu"))
        for module in self.distiller.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        self.optimizer = make_optimizer(self.distiller, self.job.recipe.training)

    def first_step(self):
        spec = make_collate_spec(self.job, self.caches, self.distiller)
        loader = PrefetchLoader(self.dataset, self.batch_sampler, spec, WorkerGroup(), 0, self.job.seed)
        loaded = next(iter(loader))
        loader.close()
        return loaded

    def take(self, loaded, coefficients):
        inputs = loaded.step, loaded.batches, coefficients
        return take_step(self.distiller, self.optimizer, *inputs, None, WorkerGroup(), self.dataset.sequence_id)

    def gradients(self, loaded, coefficients):
        """Gradients by name and the result of a step."""
        kept = {}
        self.optimizer.register_step_pre_hook(
            lambda *_: kept.update({n: p.grad.clone() for n, p in self.distiller.named_parameters()})
        )
        result = self.take(loaded, coefficients)
        return kept, result


def test_the_loss_of_a_step_is_the_exact_mean_over_its_labels(small_run):
    training = Training(small_run, "control")
    loaded = training.first_step()
    assert len(loaded.batches) > 1
    nll = torch.zeros((), dtype=torch.float64)
    labels = 0
    model = training.distiller.student.model
    for number in (index for batch in loaded.step.micro_batches for index in batch):
        sequence = training.dataset[number][0].sequence
        ids = torch.from_numpy(sequence.input_ids_N).long()
        logits = model(ids[None, :-1]).logits[0]
        nll = nll + torch.nn.functional.cross_entropy(logits.double(), ids[1:], reduction="sum")
        labels += len(ids) - 1
    model.zero_grad()
    (nll / labels).backward()
    expected = {name: p.grad.clone() for name, p in training.distiller.named_parameters()}
    model.zero_grad()
    got, result = training.gradients(loaded, Coefficients())
    assert result.loss == pytest.approx(nll.item() / labels, rel=1e-6)
    assert set(got) == set(expected)
    for name in expected:
        assert torch.allclose(got[name], expected[name], atol=1e-6), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"feature": {"balance": True}},
        *({"selection": {"by": by, "share": 0.25}} for by in ("random", "student_entropy", "ce_ratio", "label_cost")),
        {"selection": {"by": "teacher_entropy", "how": "weigh"}},
        {"distribution": {"loss": {"forward_kl": 0.6, "reverse_kl": 0.4}}},
    ],
    ids=str,
)
def test_loss_and_gradient_of_a_step_do_not_depend_on_its_packing(small_run, changes):
    coefficients = Coefficients(kd=0.6, ce=0.4, feature=0.1, relation=0.2)
    weights = {"losses": {"kd": 0.6, "ce": 0.4, "feature": 0.1, "relation": 0.2}, "relation": {"window": 8, "heads": 2}}
    results = []
    for tokens_per_batch in (48, 96, 256):
        training = Training(small_run, tokens_per_batch=tokens_per_batch, **weights, **changes)
        training.distiller.projections.balance.fill_(3.0)
        results.append(training.gradients(training.first_step(), coefficients))
    for gradients, result in results[1:]:
        assert result.loss == pytest.approx(results[0][1].loss, rel=1e-5)
        assert result.parts == pytest.approx(results[0][1].parts, rel=1e-5)
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, results[0][0][name], atol=1e-6), name


def test_masked_labels_do_not_count(small_run):
    training = Training(small_run, "control")
    loaded = training.first_step()
    only = loaded.batches[0]
    weight_T = torch.zeros_like(only.targets.weight_T)
    weight_T[3] = 1.0
    masked = replace(only, targets=replace(only.targets, weight_T=weight_T))
    step = replace(loaded.step, micro_batches=loaded.step.micro_batches[:1])
    state, _ = training.distiller.student.states(only.input_ids_N, only.position_ids_N)
    weight, _ = training.distiller.student.head()
    logits = state[only.row_T[3]] @ weight.T
    expected = torch.nn.functional.cross_entropy(logits[None], only.targets.label_T[3:4]).item()
    assert training.take(replace(loaded, step=step, batches=[masked]), Coefficients()).loss == pytest.approx(
        expected, rel=1e-5
    )


def test_a_loss_that_is_not_finite_raises_before_any_weight_changes(small_run):
    training = Training(small_run)
    loaded = training.first_step()
    bad = loaded.batches[1]
    bad.targets.tail_logmass_T[2] = torch.nan
    before = [p.detach().clone() for p in training.distiller.parameters()]
    with pytest.raises(TrainingError, match=r"step 0: expected finite losses, got .*nan") as error:
        training.take(loaded, Coefficients(kd=1.0, ce=0.0))
    assert ", ".join(bad.sequence_ids) in str(error.value)
    assert loaded.batches[0].sequence_ids[0] not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, training.distiller.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_raises_before_any_weight_changes(small_run):
    training = Training(small_run, "control")
    loaded = training.first_step()
    before = [p.detach().clone() for p in training.distiller.parameters()]
    first = next(iter(training.distiller.parameters()))
    first.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TrainingError, match="step 0: expected a finite gradient"):
        training.take(loaded, Coefficients())
    assert all(torch.equal(a, b) for a, b in zip(before, training.distiller.parameters(), strict=True))


def test_a_step_whose_labels_are_all_masked_changes_no_weight(small_run):
    training = Training(small_run, "control")
    loaded = training.first_step()
    for batch in loaded.batches:
        batch.targets.weight_T.zero_()
    before = [p.detach().clone() for p in training.distiller.parameters()]
    assert training.take(loaded, Coefficients()).loss == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, training.distiller.parameters(), strict=True))


def test_the_loss_in_bfloat16_is_near_that_in_float32(small_run):
    losses = []
    for dtype in ("float32", "bfloat16"):
        training = Training(small_run, dtype=dtype)
        losses.append(training.take(training.first_step(), Coefficients(kd=0.5, ce=0.5, feature=0.1)).loss)
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    assert losses[1] != losses[0]


def test_projections_start_as_the_identity_between_equal_widths(small_run):
    training = Training(small_run)
    assert set(training.distiller.layer_map.features) == {1, -1}
    for layer in training.distiller.layer_map.features:
        assert torch.equal(training.distiller.projections.weight_ED(layer), torch.eye(16))


def test_a_balanced_feature_loss_is_scaled_to_the_output_loss_of_the_step_before(small_run):
    training = Training(small_run, feature={"balance": True})
    loaded, coefficients = training.first_step(), Coefficients(kd=0.5, ce=1.0, feature=1.0)
    first, second = training.take(loaded, coefficients), training.take(loaded, coefficients)
    output = [0.5 * result.parts["kd"] + result.parts["ce"] for result in (first, second)]
    assert first.loss == pytest.approx(output[0] + first.parts["feature"], rel=1e-5)
    balanced = second.parts["feature"] * output[0] / first.parts["feature"]
    assert second.loss == pytest.approx(output[1] + balanced, rel=1e-5)
    assert balanced == pytest.approx(output[1], rel=0.2)  # the student has moved


def test_the_balance_uses_the_output_loss_with_its_coefficients_and_temperature(small_run):
    distiller = Training(small_run, distribution={"temperature": 2.0}).distiller
    distiller.rebalance({"kd": 1.0, "ce": 3.0, "feature": 2.0}, Coefficients(kd=0.5, ce=1.0))
    assert distiller.projections.balance.item() == (0.5 * 4.0 + 3.0) / 2.0
    distiller.rebalance({"kd": 0.0, "ce": 0.0, "feature": 0.0}, Coefficients())
    assert distiller.projections.balance.item() == 2.5


def test_the_balance_is_saved_in_a_checkpoint(small_run):
    training = Training(small_run)
    training.distiller.projections.balance.fill_(2.5)
    state_dicts = collect_state_dicts(training.distiller, training.optimizer, WorkerGroup())
    training.distiller.projections.balance.fill_(1.0)
    assert state_dicts is not None
    load_state_dicts(training.distiller, training.optimizer, Snapshot(1, {}, state_dicts))
    assert training.distiller.projections.balance.item() == 2.5


def test_clip_grad_norm_scales_a_gradient_down_and_never_up():
    parameter = torch.nn.Parameter(torch.zeros(2))
    for limit, expected in ((1.0, [0.6, 0.8]), (10.0, [3.0, 4.0]), (None, [3.0, 4.0])):
        parameter.grad = torch.tensor([3.0, 4.0])
        assert clip_grad_norm_([parameter], limit) == pytest.approx(5.0)
        assert parameter.grad.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scheduler", ["constant", "constant_with_warmup", "linear", "cosine", "warmup_stable_decay"])
def test_every_schedule_peaks_at_the_learning_rate_and_is_never_0(scheduler):
    rate_at = learning_rate_schedule(TrainingSpec(learning_rate=1e-3, scheduler=scheduler, warmup=0.1), 40)
    rates = [rate_at(step) for step in range(40)]
    assert max(rates) == pytest.approx(1e-3, rel=0.05)
    assert min(rates) > 0.0
    assert [rate_at(step) for step in reversed(range(40))] == rates[::-1]


def test_coefficients_follow_their_schedules(small_run):
    losses = {"kd": {"value": 1.0, "kind": "linear"}, "ce": 0.5, "feature": {"value": 2.0, "warmup": 0.5}}
    training = small_run.recipe(losses=losses).training
    first, last = (coefficients_at(training, step, 10) for step in (0, 9))
    assert (first.ce, last.ce) == (0.5, 0.5)
    assert first.kd > last.kd
    assert first.feature < last.feature == 2.0
    assert {name: getattr(Coefficients(), name) for name in PARTS} == {"kd": 0, "ce": 1, "feature": 0, "relation": 0}
