import signal
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config import recipe_from_dict
from pipeline.contracts import ScoredSequence, Signals, TokenSequence
from pipeline.errors import RecipeError
from student.data.batch_sampler import BatchSampler
from student.data.dataset import CacheDataset, IndexEntry, make_batch_sampler
from student.loop.setup import make_distiller
from student.model.build import Student
from student.model.layer_gaps import (
    CALIBRATION_TOKENS,
    RIDGE,
    _solve,
    calibration_sequences,
    fill_layer_gaps,
    layer_gaps,
)
from student.training_job import TrainingJob

SIZES = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8}


@dataclass
class MemoryDataset:
    """In place of a CacheDataset: sequences with one captured state each."""

    scored: list[ScoredSequence]
    index: list[IndexEntry] = field(init=False)

    def __post_init__(self):
        self.index = [IndexEntry("u", len(one.sequence.input_ids_N), (0,)) for one in self.scored]

    def __getitem__(self, number):
        return [self.scored[number]]


def student_of(model_type="llama", layers=2):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, num_key_value_heads=1, num_hidden_layers=layers)
    return Student(AutoModelForCausalLM.from_config(config).float())


def state(student, layer, ids_N):
    with torch.no_grad():
        return student.states(ids_N, torch.arange(len(ids_N)), [layer])[1][layer]


def dataset_with(teacher_state, sequences=24, tokens=20):
    """Random sequences whose captured state is `teacher_state(ids_N)`, without the row of the last token."""
    rng, scored = np.random.default_rng(0), []
    for number in range(sequences):
        ids_N = rng.integers(0, 60, tokens).astype(np.int32)
        hidden_TD = teacher_state(torch.from_numpy(ids_N).long())[:-1].bfloat16()
        bits_TLD = hidden_TD.view(torch.int16).numpy().view(np.uint16)[:, None]
        ones, ends = np.ones(tokens, np.uint8), np.arange(1, tokens + 1, dtype=np.int32)
        sequence = TokenSequence(f"s{number}", f"d{number}", None, "train", ids_N, ones, ends)
        zeros_T = np.zeros(tokens - 1, np.float32)
        signals = Signals(np.zeros((tokens - 1, 1), np.int32), zeros_T[:, None], zeros_T, zeros_T, zeros_T,
                          zeros_T[:, None], None, None, bits_TLD, None)  # fmt: skip
        scored.append(ScoredSequence(sequence, signals))
    return MemoryDataset(scored)


def distance(student, dataset):
    """Squared error of the state behind the first layer, relative to the captured state's squared norm."""
    squares = torch.zeros(2)
    for one in dataset.scored:
        expected_TD = torch.from_numpy(one.signals.hidden_TLD[:, 0].view(np.int16)).view(torch.bfloat16).float()
        got_ND = state(student, 1, torch.from_numpy(one.sequence.input_ids_N).long())
        squares += torch.stack([(expected_TD - got_ND[:-1]).square().sum(), expected_TD.square().sum()])
    return float(squares[0] / squares[1])


def test_a_gap_is_between_two_kept_layers():
    assert layer_gaps([0, 1, 4, 5, 7], [7, 4, -1]) == {2: 4, 4: 7}
    assert layer_gaps([2, 3, 5], [5]) == {2: 5}


@pytest.mark.parametrize("kept", [[0, 1, 2], [2, 3], [0]])
def test_a_student_without_a_gap_is_refused(kept):
    with pytest.raises(
        RecipeError, match=r"training\.feature\.layer_gap_least_squares: expected a student with pruned"
    ):
        layer_gaps(kept, [1, 2, -1])


def test_a_state_that_was_not_captured_is_refused():
    with pytest.raises(RecipeError, match=r"states \[4\] in the cache, got \[7, -1\]; add them to capture"):
        layer_gaps([0, 1, 4, 5, 7], [7, -1])


def test_the_change_solves_the_ridge_regression_of_the_docstring():
    rng = np.random.default_rng(1)
    input_TI, missing_TD, weight_T1 = rng.normal(size=(40, 6)), rng.normal(size=(40, 3)), rng.random((40, 1)) + 0.1
    scale_I = np.sqrt((weight_T1 * input_TI**2).sum(0))
    stacked_I = np.concatenate([np.sqrt(weight_T1) * input_TI, np.sqrt(RIDGE) * np.diag(scale_I)])
    target_ID = np.concatenate([np.sqrt(weight_T1) * missing_TD, np.zeros((6, 3))])
    expected_ID = np.linalg.lstsq(stacked_I, target_ID, rcond=None)[0]
    parts = [tuple(map(torch.from_numpy, (x[part], d[part], w[part])))
             for x, d, w in [(input_TI, missing_TD, weight_T1)] for part in (slice(0, 15), slice(15, 40))]  # fmt: skip
    assert np.allclose(_solve(iter(parts)).numpy(), expected_ID.T, atol=1e-9)


def test_the_layer_in_front_of_the_gap_approximates_the_teachers_state_behind_it():
    student, teacher = student_of(), student_of()
    with torch.no_grad():
        teacher.layers[0].mlp.down_proj.weight += torch.randn(16, 24, generator=torch.Generator().manual_seed(3))
    dataset, expected = dataset_with(lambda ids_N: state(teacher, 1, ids_N)), teacher.layers[0].mlp.down_proj.weight
    before, others = distance(student, dataset), student.layers[0].self_attn.o_proj.weight.clone()
    missing = torch.dist(student.layers[0].mlp.down_proj.weight, expected)
    fill_layer_gaps(student, {1: 5}, dataset, range(24), [5])
    assert distance(student, dataset) < 0.1 * before
    assert torch.dist(student.layers[0].mlp.down_proj.weight, expected) < 0.5 * missing
    assert torch.equal(student.layers[0].self_attn.o_proj.weight, others)


def test_calibration_uses_only_training_sequences_up_to_its_number_of_tokens():
    dataset = dataset_with(lambda ids_N: torch.ones(len(ids_N), 16))
    sampler = BatchSampler(
        [20] * 24, [0] * 24, seed=1, tokens_per_step=40, tokens_per_batch=40, epochs=2.0, max_steps=3
    )
    read = [index for number in range(3) for batch in sampler[number].micro_batches for index in batch]
    assert calibration_sequences(sampler, dataset) == read
    assert len(read) == 6
    dataset.index = [replace(entry, tokens=CALIBRATION_TOKENS // 2) for entry in dataset.index]
    assert calibration_sequences(sampler, dataset) == read[:2]


def test_the_change_is_deterministic():
    dataset = dataset_with(lambda ids_N: torch.sin(ids_N[:, None] * torch.arange(1.0, 17.0)))
    first, second = student_of(), student_of()
    for student in (first, second):
        fill_layer_gaps(student, {1: 5}, dataset, range(24), [5])
    assert torch.equal(first.layers[0].mlp.down_proj.weight, second.layers[0].mlp.down_proj.weight)
    assert not torch.equal(first.layers[0].mlp.down_proj.weight, student_of().layers[0].mlp.down_proj.weight)


def test_a_layer_that_normalizes_the_output_of_its_last_matrix_is_refused_and_not_changed():
    student, dataset = student_of("gemma2"), dataset_with(lambda ids_N: torch.ones(len(ids_N), 16))
    before = student.layers[0].mlp.down_proj.weight.clone()
    with pytest.raises(RecipeError, match="a Gemma2DecoderLayer which transforms it; set it to false"):
        fill_layer_gaps(student, {1: 5}, dataset, range(24), [5])
    assert torch.equal(student.layers[0].mlp.down_proj.weight, before)


@pytest.fixture
def run_with_teacher(empty_run, tmp_path):
    """A run with a small Llama as teacher, not captured yet."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    student_of(layers=4).model.save_pretrained(tmp_path / "teacher")
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "shard": 1, "teacher": 2, "entropy": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(tmp_path / "teacher")
    return empty_run


def recipe_with_layer_gap(run, folder):
    """A recipe whose student lacks two layers of the teacher, in which the changed layer is frozen."""
    teacher = {"name": "real", "model": str(folder / "teacher"), "engine": "transformers", "dtype": "float32"}
    training = {"feature": {"layer_gap_least_squares": True}, "freeze": ["model.layers.0."], "epochs": 3.0}
    student = {"from_teacher": "real", "layers": [0, 3]}
    capture = {"hidden_layers": [3]}
    return run.values(teachers=[teacher], student=student, capture=capture, checkpoint_every_steps=1, **training)


def test_layer_gaps_are_filled_in_the_student_and_not_in_the_control(run_with_teacher, tmp_path):
    recipe, made = recipe_from_dict(recipe_with_layer_gap(run_with_teacher, tmp_path)), {}
    run_with_teacher.fill(recipe)
    for arm in ("student", "control"):
        job = TrainingJob(recipe, "student", arm)
        caches = job.caches()
        dataset = CacheDataset(caches, "train")
        distiller = make_distiller(job, caches, dataset, make_batch_sampler(job, dataset), torch.device("cpu"))
        made[arm] = distiller.student.layers[0].mlp.down_proj.weight
    copied = student_of(layers=4).layers[0].mlp.down_proj.weight
    assert torch.equal(made["control"], copied)
    assert torch.dist(made["student"], copied) > 1e-3


def test_a_killed_training_with_filled_layer_gaps_ends_with_the_same_bits(run_with_teacher, start, tmp_path):
    values, flag = recipe_with_layer_gap(run_with_teacher, tmp_path), tmp_path / "killed.flag"
    run_with_teacher.fill(recipe_from_dict(values))
    students = [values["student"] | {"name": name} for name in ("undisturbed", "killed")]
    undisturbed, killed = (
        TrainingJob(recipe_from_dict(values | {"student": student}), student["name"]) for student in students
    )
    assert start(undisturbed) == 0
    assert start(killed, f"after_step:2:0:{flag}") == -signal.SIGKILL
    assert flag.exists()
    assert start(killed) == 0
    first, second = (job.store.read("final/model.safetensors") for job in (undisturbed, killed))
    assert first == second
