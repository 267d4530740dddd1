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
from student.model.layer_gaps import RIDGE, TOKENS, LayerGap, _solve, calibration_sequences, fill_layer_gaps, layer_gaps
from student.training_job import TrainingJob

SIZES = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "head_dim": 8}


@dataclass
class MadeUpRows:
    """Sequences of a catalog with one captured state each."""

    views: list[ScoredSequence]
    index: list[IndexEntry] = field(init=False)

    def __post_init__(self):
        self.index = [IndexEntry("u", len(view.sequence.input_ids_N), (0,)) for view in self.views]

    def __getitem__(self, number):
        return [self.views[number]]


def student_of(model_type="llama", layers=2):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, num_key_value_heads=1, num_hidden_layers=layers)
    return Student(AutoModelForCausalLM.from_config(config).float())


def state(student, layer, ids_N):
    with torch.no_grad():
        return student.states(ids_N, torch.arange(len(ids_N)), [layer])[1][layer]


def rows_where(teacher_state, sequences=24, tokens=20):
    """Random sequences, and what `teacher_state` says of their ids as the captured state, one row less than tokens."""
    rng, views = np.random.default_rng(0), []
    for number in range(sequences):
        ids_N = rng.integers(0, 60, tokens).astype(np.int32)
        hidden_TD = teacher_state(torch.from_numpy(ids_N).long())[:-1].bfloat16()
        bits_TLD = hidden_TD.view(torch.int16).numpy().view(np.uint16)[:, None]
        ones, ends = np.ones(tokens, np.uint8), np.arange(1, tokens + 1, dtype=np.int32)
        sequence = TokenSequence(f"s{number}", f"d{number}", None, "train", ids_N, ones, ends)
        zeros_T = np.zeros(tokens - 1, np.float32)
        signals = Signals(np.zeros((tokens - 1, 1), np.int32), zeros_T[:, None], zeros_T, zeros_T, zeros_T,
                          zeros_T[:, None], None, None, bits_TLD, None)  # fmt: skip
        views.append(ScoredSequence(sequence, signals))
    return MadeUpRows(views)


def distance(student, rows):
    """Of the state behind the first layer from the captured one, as a share of the captured one's size."""
    squares = torch.zeros(2)
    for view in rows.views:
        goal_TD = torch.from_numpy(view.signals.hidden_TLD[:, 0].view(np.int16)).view(torch.bfloat16).float()
        got_ND = state(student, 1, torch.from_numpy(view.sequence.input_ids_N).long())
        squares += torch.stack([(goal_TD - got_ND[:-1]).square().sum(), goal_TD.square().sum()])
    return float(squares[0] / squares[1])


def test_a_gap_is_where_layers_between_two_others_are_left_out():
    assert layer_gaps([0, 1, 4, 5, 7], [7, 4, -1]) == [LayerGap(2, 4), LayerGap(4, 7)]
    assert layer_gaps([2, 3, 5], [5]) == [LayerGap(2, 5)]


@pytest.mark.parametrize("kept", [[0, 1, 2], [2, 3], [0]])
def test_a_student_without_a_gap_is_refused(kept):
    with pytest.raises(
        RecipeError, match=r"training\.feature\.layer_gap_least_squares: expected a student without some layers"
    ):
        layer_gaps(kept, [1, 2, -1])


def test_a_state_that_was_not_captured_is_named():
    with pytest.raises(RecipeError, match=r"states \[4\] in the cache, got \[7, -1\]; add them to capture"):
        layer_gaps([0, 1, 4, 5, 7], [7, -1])


def test_the_change_is_the_ridge_regression_that_the_docstring_names():
    rng = np.random.default_rng(1)
    input_TI, missing_TD, weight_T1 = rng.normal(size=(40, 6)), rng.normal(size=(40, 3)), rng.random((40, 1)) + 0.1
    size_I = np.sqrt((weight_T1 * input_TI**2).sum(0))
    stacked_I = np.concatenate([np.sqrt(weight_T1) * input_TI, np.sqrt(RIDGE) * np.diag(size_I)])
    goal = np.concatenate([np.sqrt(weight_T1) * missing_TD, np.zeros((6, 3))])
    expected_ID = np.linalg.lstsq(stacked_I, goal, rcond=None)[0]
    parts = [tuple(map(torch.from_numpy, (x[part], d[part], w[part])))
             for x, d, w in [(input_TI, missing_TD, weight_T1)] for part in (slice(0, 15), slice(15, 40))]  # fmt: skip
    assert np.allclose(_solve(iter(parts)).numpy(), expected_ID.T, atol=1e-9)


def test_the_layer_in_front_of_the_gap_comes_near_the_teachers_state_behind_it():
    student, teacher = student_of(), student_of()
    with torch.no_grad():
        teacher.layers[0].mlp.down_proj.weight += torch.randn(16, 24, generator=torch.Generator().manual_seed(3))
    rows, wanted = rows_where(lambda ids_N: state(teacher, 1, ids_N)), teacher.layers[0].mlp.down_proj.weight
    before, others = distance(student, rows), student.layers[0].self_attn.o_proj.weight.clone()
    missing = torch.dist(student.layers[0].mlp.down_proj.weight, wanted)
    fill_layer_gaps(student, [LayerGap(1, 5)], rows, range(24), [5])
    assert distance(student, rows) < 0.1 * before
    assert torch.dist(student.layers[0].mlp.down_proj.weight, wanted) < 0.5 * missing
    assert torch.equal(student.layers[0].self_attn.o_proj.weight, others)


def test_only_what_the_training_reads_is_asked_for_and_not_more_than_enough():
    rows = rows_where(lambda ids_N: torch.ones(len(ids_N), 16))
    sampler = BatchSampler(
        [20] * 24, [0] * 24, seed=1, tokens_per_step=40, tokens_per_batch=40, epochs=2.0, max_steps=3
    )
    read = [index for number in range(3) for batch in sampler[number].micro_batches for index in batch]
    assert calibration_sequences(sampler, rows) == read
    assert len(read) == 6
    rows.index = [replace(entry, tokens=TOKENS // 2) for entry in rows.index]
    assert calibration_sequences(sampler, rows) == read[:2]


def test_the_same_weights_come_of_every_start():
    rows = rows_where(lambda ids_N: torch.sin(ids_N[:, None] * torch.arange(1.0, 17.0)))
    first, second = student_of(), student_of()
    for student in (first, second):
        fill_layer_gaps(student, [LayerGap(1, 5)], rows, range(24), [5])
    assert torch.equal(first.layers[0].mlp.down_proj.weight, second.layers[0].mlp.down_proj.weight)
    assert not torch.equal(first.layers[0].mlp.down_proj.weight, student_of().layers[0].mlp.down_proj.weight)


def test_a_layer_that_norms_what_its_last_matrix_gives_is_refused_and_left_as_it_was():
    student, rows = student_of("gemma2"), rows_where(lambda ids_N: torch.ones(len(ids_N), 16))
    before = student.layers[0].mlp.down_proj.weight.clone()
    with pytest.raises(RecipeError, match="a Gemma2DecoderLayer that does more; leave layer_gap_least_squares out"):
        fill_layer_gaps(student, [LayerGap(1, 5)], rows, range(24), [5])
    assert torch.equal(student.layers[0].mlp.down_proj.weight, before)


@pytest.fixture
def taught(empty_run, tmp_path):
    """A run whose teacher, a small Llama, has been captured with the state behind its third layer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    student_of(layers=4).model.save_pretrained(tmp_path / "teacher")
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "shard": 1, "teacher": 2, "entropy": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(tmp_path / "teacher")
    return empty_run


def recipe_with_layer_gap(run, folder):
    """A recipe whose student lacks two layers of the teacher, in which the bridged layer is frozen."""
    teacher = {"name": "real", "model": str(folder / "teacher"), "engine": "transformers", "dtype": "float32"}
    training = {
        "feature": {"layer_gap_least_squares": True},
        "freeze": ["model.layers.0."],
        "checkpoint_every_steps": 1,
        "epochs": 3.0,
    }
    student = {"from_teacher": "real", "layers": [0, 3]}
    return run.values(teachers=[teacher], student=student, capture={"hidden_layers": [3]}, **training)


def test_a_control_is_not_bridged_and_a_student_is(taught, tmp_path):
    recipe, made = recipe_from_dict(recipe_with_layer_gap(taught, tmp_path)), {}
    taught.fill(recipe)
    for arm in ("student", "control"):
        job = TrainingJob(recipe, "student", arm)
        caches = job.caches()
        rows = CacheDataset(caches, "train")
        distiller = make_distiller(job, caches, rows, make_batch_sampler(job, rows), torch.device("cpu"))
        made[arm] = distiller.student.layers[0].mlp.down_proj.weight
    inherited = student_of(layers=4).layers[0].mlp.down_proj.weight
    assert torch.equal(made["control"], inherited)
    assert torch.dist(made["student"], inherited) > 1e-3


def test_a_bridged_training_that_was_killed_ends_with_the_same_bits(taught, start, tmp_path):
    values, flag = recipe_with_layer_gap(taught, tmp_path), tmp_path / "struck"
    taught.fill(recipe_from_dict(values))
    students = [values["student"] | {"name": name} for name in ("whole", "killed")]
    whole, killed = (
        TrainingJob(recipe_from_dict(values | {"student": student}), student["name"]) for student in students
    )
    assert start(whole) == 0
    assert start(killed, f"after_step:2:0:{flag}") == -signal.SIGKILL
    assert flag.exists()
    assert start(killed) == 0
    first, second = (job.store.read("final/model.safetensors") for job in (whole, killed))
    assert first == second
