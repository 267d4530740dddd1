"""Trackers of a training: which steps a resumed one keeps, and that it continues its own runs."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from pipeline.cache.storage.store import Store
from pipeline.errors import RecipeError
from student.tracking.trackers import JsonLines, TensorBoard, check_trackers, open_trackers


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "run")


def steps_in(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def board(store, first_step, steps, value):
    tensorboard = TensorBoard(store, first_step)
    for step in steps:
        tensorboard.log(step, {"loss": value})
    return tensorboard


def test_json_lines_are_truncated_to_the_checkpoint(store):
    for first_step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        lines = JsonLines(store, "log.jsonl", first_step)
        for step in steps:
            lines.write({"step": step})
        lines.close()
    assert [json.loads(line)["step"] for line in store.read("log.jsonl").splitlines()] == [1, 2, 3, 4]


def test_tensorboard_shows_every_step_once_after_a_resume(store):
    board(store, 0, (1, 2, 3), 1.0).close()
    board(store, 2, (3, 4), 2.0).close()
    assert steps_in(store.local_path() / "tensorboard") == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_tensorboard_files_of_an_attempt_without_a_checkpoint_are_deleted(store):
    board(store, 0, (1, 2), 1.0).close()
    (old,) = store.list("tensorboard")
    board(store, 0, (1,), 2.0).close()
    assert old not in store.list("tensorboard")
    assert steps_in(store.local_path() / "tensorboard") == [(1, 2.0)]


def test_event_files_are_uploaded_to_a_remote_store_with_every_checkpoint(tmp_path):
    store = Store.open(f"memory://stillhouse-trackers/{tmp_path.name}")
    tensorboard = board(store, 0, (1, 2), 1.0)
    for path, data in tensorboard.contents().items():  # then the process is killed
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    assert steps_in(tmp_path / "tensorboard") == [(1, 1.0), (2, 1.0)]
    tensorboard.close()
    assert store.list("tensorboard")


def fake(monkeypatch, name, **attributes):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def mlflow(monkeypatch):
    """The part of MLflow that is called: runs by id, each with its (step, values)."""
    runs, open_runs = {}, []

    def start_run(run_id=None, run_name=None):
        run_id = run_id or f"run-{len(runs)}"
        runs.setdefault(run_id, {"name": run_name, "logged": []})
        open_runs.append(run_id)
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

    def log_metrics(values, step):
        runs[open_runs[-1]]["logged"].append((step, values))

    fake(monkeypatch, "mlflow", start_run=start_run, log_metrics=log_metrics, end_run=open_runs.pop)
    return SimpleNamespace(runs=runs, open_runs=open_runs)


@pytest.fixture
def wandb(monkeypatch):
    """The part of Weights & Biases that is called."""
    runs = {}

    def init(project, name, id, resume):
        assert (project, resume) == ("stillhouse", "allow")
        run = runs.setdefault(id, SimpleNamespace(name=name, logged=[], ended=0))

        def finish():
            run.ended += 1

        return SimpleNamespace(log=lambda values, step: run.logged.append((step, values)), finish=finish)

    fake(monkeypatch, "wandb", init=init)
    return SimpleNamespace(runs=runs)


def attempt(store, names, steps):
    for tracker in open_trackers(names, store, "small/student"):
        for step in steps:
            tracker.log(step, {"loss": float(step)})
        tracker.close()


def test_a_resumed_training_continues_its_mlflow_run(store, mlflow):
    attempt(store, ["mlflow"], (1, 2))
    attempt(store, ["mlflow"], (3,))
    (run,) = mlflow.runs.values()
    assert run == {"name": "small/student", "logged": [(n, {"loss": float(n)}) for n in (1, 2, 3)]}
    assert mlflow.open_runs == []


def test_a_resumed_training_continues_its_wandb_run_and_another_storage_has_another_run(store, tmp_path, wandb):
    attempt(store, ["wandb"], (1,))
    attempt(store, ["wandb"], (2,))
    attempt(Store.open(tmp_path / "other"), ["wandb"], (1,))
    first, second = wandb.runs.values()
    assert [step for step, _ in first.logged] == [1, 2]
    assert [step for step, _ in second.logged] == [1]
    assert (first.ended, second.ended) == (2, 1)


def test_several_trackers_can_be_open_and_none_writes_nothing(store, tmp_path, mlflow, wandb):
    attempt(store, ["mlflow", "wandb"], (1,))
    assert set(json.loads(store.read("trackers.json"))) == {"mlflow", "wandb"}
    other = Store.open(tmp_path / "other")
    attempt(other, [], (1,))
    assert other.list() == []


def test_a_missing_tracker_package_is_an_error_with_the_command_that_installs_it(mlflow, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_trackers(["mlflow"])
    with pytest.raises(
        RecipeError, match=r"training.trackers: wandb is not installed; pip install 'stillhouse\[track\]'"
    ):
        check_trackers(["mlflow", "wandb"])
