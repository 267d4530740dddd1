"""Jobs are processes of their own: job file, exit codes, signals."""

import signal
from pathlib import Path

import pytest

from pipeline.errors import ExitCode
from pipeline.run.jobs import JOB_MODULES, Job
from pipeline.run.launch import launch


@pytest.fixture
def job_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that makes a job out of a module's source and its values."""

    def make(source: str, **values: object) -> Job:
        (tmp_path / "job_of_test.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setitem(JOB_MODULES, "test", "job_of_test")
        return Job("test", "name", values, "key")

    return make


def test_a_killed_job_returns_its_signal(job_of) -> None:
    assert launch(job_of("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")) == -signal.SIGKILL


@pytest.mark.parametrize("ends", ["sys.exit(130)", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_an_interrupted_job_interrupts_the_run(job_of, ends: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        launch(job_of(f"import os, signal, sys\n{ends}\n"))


def test_a_sigterm_is_passed_on_to_the_job(job_of, tmp_path: Path) -> None:
    """The job sends it to its parent and waits for its own."""
    job = job_of(
        "import os, pathlib, signal, sys, time\n"
        "def end(*_):\n"
        f"    pathlib.Path({str(tmp_path / 'received')!r}).touch()\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(30)\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        launch(job)
    assert (tmp_path / "received").exists()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("code", "expected"), [(0, ExitCode.DONE), (3, ExitCode.INCOMPLETE), (77, 77)])
def test_a_job_reads_its_values_from_a_file_and_returns_its_exit_code(job_of, tmp_path: Path, code, expected) -> None:
    source = (
        "import json, os, pathlib, sys\n"
        "values = json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
        "pathlib.Path(values['answer']).write_text(str(os.getpid()))\n"
        "sys.exit(values['code'])\n"
    )
    assert launch(job_of(source, answer=str(tmp_path / "pid"), code=code)) == expected
    assert int((tmp_path / "pid").read_text()) > 1
