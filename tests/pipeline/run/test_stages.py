"""Jobs of a run, when a job is done, and what a failure does to the others."""

import json
import signal
from pathlib import Path

import pytest

import pipeline.run.stages
from pipeline.cache.storage.store import Store
from pipeline.config import Recipe, load_recipe
from pipeline.errors import ExitCode
from pipeline.run.jobs import Job, jobs_of
from pipeline.run.stages import run


def recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe("dummy", [f"storage={folder / 'run'}", *overrides])


def keys(folder: Path, *overrides: str) -> dict[str, str]:
    return {job.name: job.key for job in jobs_of(recipe(folder, *overrides))}


def write_outputs(job: Job) -> ExitCode:
    """Write what a successful job writes."""
    for file in job.outputs:
        Store.open(job.values["recipe"]["storage"]).put(file, b"{}")
    return ExitCode.DONE


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the jobs that were launched; all of them end well and leave what they should."""
    names: list[str] = []

    def note(job: Job) -> ExitCode:
        names.append(job.name)
        return write_outputs(job)

    monkeypatch.setattr(pipeline.run.stages, "launch", note)
    return names


ALL = ["capture", "train-student", "train-student-control", "evaluate", "export"]


def test_the_stages_in_their_order(tmp_path: Path) -> None:
    assert list(keys(tmp_path)) == ALL
    assert list(keys(tmp_path, "evaluation.control=none")) == [name for name in ALL if "control" not in name]


def test_a_second_run_launches_nothing(tmp_path: Path, launched: list[str]) -> None:
    assert run(recipe(tmp_path)) is ExitCode.DONE
    assert run(recipe(tmp_path)) is ExitCode.DONE
    assert launched == ALL


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("capture.k=8", ALL),
        ("training.learning_rate=1e-4", ALL[1:]),
        ("evaluation.batch_tokens=4096", ALL[3:]),
        ("teachers[0].replicas=2", []),
        ("cluster.cpus=4", []),
    ],
)
def test_a_change_launches_what_depends_on_it(
    tmp_path: Path, launched: list[str], override: str, again: list[str]
) -> None:
    run(recipe(tmp_path))
    launched.clear()
    run(recipe(tmp_path, override))
    assert launched == again


def test_changed_text_is_noticed(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one")
    before = keys(tmp_path, f"corpus.source={text}")
    text.write_text("two two")
    after = keys(tmp_path, f"corpus.source={text}")
    assert all(before[name] != after[name] for name in ALL)


def test_a_failure_ends_the_run_with_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fail(job: Job) -> ExitCode:
        seen.append(job.name)
        return ExitCode.FAILED if job.name == "train-student" else write_outputs(job)

    monkeypatch.setattr(pipeline.run.stages, "launch", fail)
    assert run(recipe(tmp_path)) is ExitCode.FAILED
    assert seen == ALL[:2]
    store = Store.open(tmp_path / "run")
    done = {job.name: job.is_done(store) for job in jobs_of(recipe(tmp_path))}
    assert done == {name: name == "capture" for name in ALL}


def test_quarantined_rows_make_the_exit_code_incomplete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = {"capture": ExitCode.INCOMPLETE}
    monkeypatch.setattr(pipeline.run.stages, "launch", lambda job: codes.get(job.name) or write_outputs(job))
    assert run(recipe(tmp_path)) is ExitCode.INCOMPLETE


def test_a_job_whose_last_output_is_missing_runs_again(tmp_path: Path, launched: list[str]) -> None:
    run(recipe(tmp_path))
    for job in jobs_of(recipe(tmp_path)):
        launched.clear()
        Store.open(tmp_path / "run").delete(job.outputs[0])
        run(recipe(tmp_path))
        assert launched == [job.name]


def test_a_record_alone_does_not_make_a_job_done(tmp_path: Path, launched: list[str]) -> None:
    store = Store.open(tmp_path / "run")
    for job in jobs_of(recipe(tmp_path)):
        store.put(f"jobs/{job.name}.json", json.dumps({"key": job.key}).encode())
    store.put("jobs/evaluate.json", b"{")
    run(recipe(tmp_path))
    assert launched == ALL


def test_a_job_that_writes_no_output_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline.run.stages, "launch", lambda job: ExitCode.DONE)
    assert run(recipe(tmp_path)) is ExitCode.FAILED
    assert "capture: failed: it did not write" in capsys.readouterr().err
    assert not Store.open(tmp_path / "run").list("jobs")


def test_a_killed_job_is_reported_as_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline.run.stages, "launch", lambda job: -signal.SIGKILL)
    assert run(recipe(tmp_path)) is ExitCode.FAILED
    assert "capture: killed by signal 9 (out of memory?)" in capsys.readouterr().err


def test_only_the_asked_stages_run(tmp_path: Path, launched: list[str]) -> None:
    run(recipe(tmp_path), ["train"])
    assert launched == ["train-student", "train-student-control"]


def test_the_resolved_recipe_is_kept(tmp_path: Path, launched: list[str]) -> None:
    asked = recipe(tmp_path, "seed=5")
    run(asked)
    assert json.loads(Store.open(asked.storage).read("recipe.json")) == asked.to_dict()
