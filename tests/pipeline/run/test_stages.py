"""Which jobs a run consists of, when one counts as done, and what a failure does to the rest."""

import json
import signal
from pathlib import Path

import pytest

import pipeline.run.stages
from pipeline.cache.storage.store import Store
from pipeline.config import Recipe, load_recipe
from pipeline.errors import ExitCode
from pipeline.run.stages import Job, is_done, jobs_of, launch, run


def recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe("dummy", [f"storage={folder / 'run'}", *overrides])


def keys(folder: Path, *overrides: str) -> dict[str, str]:
    return {job.name: job.key for job in jobs_of(recipe(folder, *overrides))}


def leave(job: Job) -> ExitCode:
    """What a job that ends well leaves."""
    for file in job.leaves:
        Store.open(job.told["recipe"]["storage"]).put(file, b"{}")
    return ExitCode.DONE


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the jobs that were launched; all of them end well and leave what they should."""
    names: list[str] = []

    def note(job: Job) -> ExitCode:
        names.append(job.name)
        return leave(job)

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
        return ExitCode.FAILED if job.name == "train-student" else leave(job)

    monkeypatch.setattr(pipeline.run.stages, "launch", fail)
    assert run(recipe(tmp_path)) is ExitCode.FAILED
    assert seen == ALL[:2]
    store = Store.open(tmp_path / "run")
    done = {job.name: is_done(store, job) for job in jobs_of(recipe(tmp_path))}
    assert done == {name: name == "capture" for name in ALL}


def test_quarantined_rows_leave_their_mark_on_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = {"capture": ExitCode.INCOMPLETE}
    monkeypatch.setattr(pipeline.run.stages, "launch", lambda job: codes.get(job.name) or leave(job))
    assert run(recipe(tmp_path)) is ExitCode.INCOMPLETE


def test_a_job_whose_last_file_is_gone_runs_again(tmp_path: Path, launched: list[str]) -> None:
    run(recipe(tmp_path))
    for job in jobs_of(recipe(tmp_path)):
        launched.clear()
        Store.open(tmp_path / "run").delete(job.leaves[0])
        run(recipe(tmp_path))
        assert launched == [job.name]


def test_a_record_alone_does_not_make_a_job_done(tmp_path: Path, launched: list[str]) -> None:
    store = Store.open(tmp_path / "run")
    for job in jobs_of(recipe(tmp_path)):
        store.put(f"jobs/{job.name}.json", json.dumps({"key": job.key}).encode())
    store.put("jobs/evaluate.json", b"{")
    run(recipe(tmp_path))
    assert launched == ALL


def test_a_job_that_leaves_nothing_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline.run.stages, "launch", lambda job: ExitCode.DONE)
    assert run(recipe(tmp_path)) is ExitCode.FAILED
    assert "capture: failed: it left no" in capsys.readouterr().out
    assert not Store.open(tmp_path / "run").list("jobs")


def test_a_job_that_is_killed_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deadly.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    dead = launch(Job("s", "n", "deadly", {}, "k"))
    monkeypatch.setattr(pipeline.run.stages, "launch", lambda job: dead)
    assert run(recipe(tmp_path)) is ExitCode.FAILED
    assert "capture: killed by signal 9 (out of memory?)" in capsys.readouterr().out


@pytest.mark.parametrize("ends", ["sys.exit(130)", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_an_interrupted_job_interrupts_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    (tmp_path / "leaving.py").write_text(f"import os, signal, sys\n{ends}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        launch(Job("s", "n", "leaving", {}, "k"))


def test_a_sigterm_reaches_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job sends it to us, waits for its own, and says so."""
    (tmp_path / "waiting.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "def leave(*_):\n"
        f"    pathlib.Path({str(tmp_path / 'told')!r}).touch()\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(30)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        launch(Job("s", "n", "waiting", {}, "k"))
    assert (tmp_path / "told").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_only_the_asked_stages_run(tmp_path: Path, launched: list[str]) -> None:
    run(recipe(tmp_path), ["train"])
    assert launched == ["train-student", "train-student-control"]


def test_a_job_is_a_process_of_its_own_that_is_told_by_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "told.py").write_text(
        "import json, os, pathlib, sys\n"
        "told = json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
        "pathlib.Path(told['answer']).write_text(str(os.getpid()))\n"
        "sys.exit(told['code'])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for code, expected in ((0, ExitCode.DONE), (3, ExitCode.INCOMPLETE), (77, 77)):
        told = {"answer": str(tmp_path / "pid"), "code": code}
        assert launch(Job("s", "n", "told", told, "k")) == expected
    assert int((tmp_path / "pid").read_text()) > 1


def test_the_resolved_recipe_is_kept(tmp_path: Path, launched: list[str]) -> None:
    asked = recipe(tmp_path, "seed=5")
    run(asked)
    assert json.loads(Store.open(asked.storage).read("recipe.json")) == asked.to_dict()
