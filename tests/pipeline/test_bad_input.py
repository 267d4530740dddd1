"""What a user gets for bad input: one line, exit code 2, no traceback, nothing lost."""

import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import pipeline.run.stages
from pipeline.config import Recipe, load_recipe
from pipeline.config.loader import RECIPES
from pipeline.errors import ExitCode
from pipeline.models.tokenizers import ByteTokenizer
from pipeline.run.cli import main
from pipeline.run.jobs import JOB_MODULES, Job

Answer = tuple[int, str]
Cli = Callable[..., Answer]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line with jobs inside this process; answer with exit code and stderr."""

    def launch(job: Job) -> ExitCode:
        path = tmp_path / "job.json"
        path.write_text(json.dumps(job.values))
        return ExitCode(importlib.import_module(JOB_MODULES[job.stage]).main([str(path)]))

    def call(*arguments: str) -> Answer:
        capfd.readouterr()
        code = main(arguments)
        return code, capfd.readouterr().err

    monkeypatch.setattr(pipeline.run.stages, "launch", launch)
    monkeypatch.chdir(tmp_path)
    return call


@pytest.fixture(scope="module")
def captured_once(tmp_path_factory: pytest.TempPathFactory, capture_here: Callable[[Recipe], None]) -> Path:
    folder = tmp_path_factory.mktemp("captured")
    capture_here(load_recipe("dummy", [f"storage={folder / 'runs/dummy'}"]))
    return folder


@pytest.fixture
def captured(captured_once: Path, tmp_path: Path) -> None:
    """The dummy recipe's cache is there."""
    shutil.copytree(captured_once, tmp_path, dirs_exist_ok=True)


def refused(answer: Answer, *words: str) -> None:
    code, stderr = answer
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == ExitCode.USAGE, stderr
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.wrokers=1", ["override training.wrokers=1: unknown key", "did you mean workers?"]),
        ("training.workers=many", ["override training.workers=many: expected an integer", '"many"']),
    ],
)
def test_a_wrong_recipe(cli: Cli, override: str, words: list[str]) -> None:
    refused(cli("capture", "dummy", override), *words)


def test_a_duplicate_key(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: r\nstorage: s\nname: q\n")
    refused(cli("capture", "r.yaml"), "r.yaml:3", "name", "duplicate key")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.jsonl", b"", ["empty.jsonl"]),
        ("void.jsonl", b'{"id": "a", "text": ""}\n', ["void.jsonl", "a"]),
        ("latin.txt", b"caf\xe9 au lait\n", ["latin.txt", "UTF-8", "0xe9"]),
        ("latin.jsonl", b'{"id": "a", "text": "fine"}\n{"id": "b", "text": "caf\xe9"}\n', ["latin.jsonl:2", "UTF-8"]),
        ("odd.jsonl", b'{"id": "a", "text": "fine"}\nnot json\n', ["odd.jsonl:2"]),
        ("twice.jsonl", b'{"id": "a", "text": "one"}\n{"id": "a", "text": "two"}\n', ["twice.jsonl", "a"]),
    ],
)
def test_a_corpus_that_cannot_be_used(cli: Cli, tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    refused(cli("capture", "dummy", f"corpus.source={name}"), *words)


def test_a_corpus_that_is_not_there(cli: Cli) -> None:
    refused(cli("capture", "dummy", "corpus.source=nowhere.jsonl"), "nowhere.jsonl")


def model_folder(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 320} | config))
    return folder


def with_model(folder: Path) -> list[str]:
    return [f"teachers[0].model={folder}", "teachers[0].engine=transformers", "teachers[0].options={}"]


def test_a_model_folder_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    refused(cli("capture", "dummy", *with_model(tmp_path / "gone")), "gone")


def test_a_model_folder_without_safetensors(cli: Cli, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    refused(cli("capture", "dummy", *with_model(folder)), str(folder), "safetensors")


def test_a_model_that_wants_to_run_its_own_code(cli: Cli, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    refused(cli("capture", "dummy", *with_model(folder)), "auto_map")


def test_more_entries_than_the_vocabulary_has(cli: Cli) -> None:
    refused(cli("capture", "dummy", "capture.k=320"), "override capture.k=320: expected 1..V-1 (V=320), got 320")


def test_a_hidden_layer_out_of_range(cli: Cli) -> None:
    refused(cli("capture", "dummy", "capture.hidden_layers=[5]"), "hidden_layers", "5", "4")


@pytest.mark.usefixtures("captured")
def test_what_the_teacher_or_the_training_refuses_has_its_line_too(cli: Cli, tmp_path: Path) -> None:
    shipped = (RECIPES / "dummy.yaml").read_text()
    for old, new, stage, words in (
        ("hidden_layers: [2, -1]", "hidden_layers: [9]", "capture", "capture.hidden_layers: expected 0..4 or -1"),
        ("tokens_per_batch: 512", "tokens_per_batch: 64", "train", "training.tokens_per_batch: expected at least"),
    ):
        (tmp_path / "r.yaml").write_text(shipped.replace(old, new))
        line = next(n for n, text in enumerate(shipped.splitlines(), 1) if old in text)
        refused(cli(stage, "r.yaml"), f"error: recipe r.yaml:{line} {words}")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense", "nowhere.invalid:6379"])
def test_a_cluster_that_does_not_answer(cli: Cli, tmp_path: Path, captured_once: Path, address: str) -> None:
    for stage in ("capture", "train"):
        answer = cli(stage, "dummy", f"cluster.address={address}")
        refused(answer, f"cluster.address: expected a Ray cluster at {address}", "cluster.address=local")
        shutil.copytree(captured_once, tmp_path, dirs_exist_ok=True)


@pytest.mark.usefixtures("captured")
def test_a_refused_command_leaves_the_runs_recipe_alone(cli: Cli, tmp_path: Path) -> None:
    assert cli("capture", "dummy")[0] == ExitCode.DONE  # as it was already; writes the recipe down
    kept = (tmp_path / "runs/dummy/recipe.json").read_bytes()
    refused(cli("capture", "dummy", "capture.k=8"), "capture.k")
    refused(cli("train", "dummy", "capture.k=8"), "capture.k")
    assert (tmp_path / "runs/dummy/recipe.json").read_bytes() == kept


@pytest.mark.parametrize(
    ("override", "word"),
    [("corpus.sequence_length=64", "sequence_length"), ("teachers[0].options.seed=3", "teacher")],
)
@pytest.mark.usefixtures("captured")
def test_a_cache_of_another_identity(cli: Cli, override: str, word: str) -> None:
    refused(cli("capture", "dummy", override), word)
    refused(cli("train", "dummy", override), word)


def model_with_another_tokenizer(folder: Path) -> Path:
    folder = model_folder(folder)
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    for name, data in ByteTokenizer().files().items():
        (folder / name).write_bytes(data.replace(b"<|turn|>", b"<|over|>"))
    return folder


@pytest.mark.usefixtures("captured")
def test_a_cache_of_another_tokenizer(cli: Cli, tmp_path: Path) -> None:
    """Of the teacher's, and of the student's that would be trained from it."""
    other = model_with_another_tokenizer(tmp_path / "other")
    refused(cli("train", "dummy", f"teachers[0].model={other}"), "tokenizer: got", "expected")
    refused(cli("train", "dummy", f"student={{checkpoint: {other}}}"), "expected the student's tokenizer")
    assert not (tmp_path / "runs/dummy/students").exists()


def test_training_without_a_cache(cli: Cli) -> None:
    refused(cli("train", "dummy", "training.workers=0"), "not captured yet; run: stillhouse capture dummy")


def test_an_object_store_without_credentials(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    refused(
        cli("plan", "dummy", "corpus.source=s3://bucket/text.jsonl"), "corpus s3://bucket/text.jsonl", "credentials"
    )


def test_a_run_folder_that_cannot_be_written(cli: Cli, tmp_path: Path) -> None:
    """A file stands where the folder should be: even root cannot write there."""
    (tmp_path / "taken").write_text("")
    refused(cli("capture", "dummy", "storage=taken/run"), "taken")
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        refused(cli("capture", "dummy", "storage=closed/run"), "closed")
