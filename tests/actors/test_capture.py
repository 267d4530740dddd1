"""The capture job: its arguments, its output, and that it does not start Ray when nothing is left to do."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from actors.capture import CaptureTask, main, warn_without_lm_head
from actors.replicas.placement import threads_of
from actors.replicas.poison_rows import max_quarantined
from pipeline.cache.commit import committed_units
from pipeline.cache.storage.store import Store
from pipeline.config import recipe_from_dict
from pipeline.run.progress import Progress


def write_job(tmp_path, teacher=None, rows=24, **options):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"id": f"d{i}", "text": f"row {i} of some text"}) + "\n" for i in range(rows)))
    spec = {"name": "a", "model": "dummy", "engine": "dummy", "options": {"vocabulary": 300, **options}}
    recipe = recipe_from_dict(
        {
            "name": "t",
            "storage": str(tmp_path / "run"),
            "cluster": {"cpus": 1},
            "corpus": {"source": str(text), "sequence_length": 64},
            "teachers": [spec],
            "capture": {"k": 4, "unit_sequences": 2},
        }
    )
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"recipe": recipe.to_dict(), "teacher": teacher}))
    return job


@pytest.mark.parametrize(
    ("config", "teacher", "words"),
    [
        ({}, {}, None),
        ({}, {"quantization": "fp8"}, "its weights are quantised (fp8)"),
        ({"quantization_config": {"quant_method": "awq"}}, {}, "its config has quantization_config"),
        ({"tie_word_embeddings": False}, {}, "its files hold no matrix of that kind"),
    ],
)
def test_a_teacher_that_no_student_can_be_evaluated_with_is_named_before_the_capture(
    tmp_path, tiny_llama, capsys, config, teacher, words
):
    shutil.copytree(tiny_llama.path, tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if words and "files" in words:
        save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "model/model.safetensors")
    values = json.loads(write_job(tmp_path).read_text())["recipe"]
    spec = {"name": "a", "model": str(tmp_path / "model"), "engine": "transformers", **teacher}
    recipe = recipe_from_dict(values | {"teachers": [spec], "student": {"from_teacher": "a", "layers": 1}})
    warn_without_lm_head(recipe, [CaptureTask.all_of(recipe, [recipe.teachers[0]])[0]])
    output = capsys.readouterr().err
    assert output.count("warning: teacher a: its cache will hold no LM head") == (words is not None)
    assert (words or "") in output


def cache_of(job):
    return Store.open(recipe_from_dict(json.loads(job.read_text())["recipe"]).cache_uri("a"))


def start(job):
    return subprocess.Popen(
        [sys.executable, "-m", "actors.capture", str(job)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["/nowhere/job.json"]])
def test_a_job_that_cannot_be_read_is_one_line_and_exit_code_2(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_teacher_that_the_recipe_lacks_is_exit_code_2(tmp_path, capsys):
    assert main([str(write_job(tmp_path, teacher="b"))]) == 2
    assert "'b'" in capsys.readouterr().err


@pytest.mark.parametrize(("cap", "rows", "allowed"), [(0.01, 2000, 20), (0.01, 70, 1), (0.0, 2000, 0), (1.0, 3, 3)])
def test_the_cap_is_rounded_up(cap, rows, allowed):
    assert max_quarantined(cap, rows) == allowed


def test_a_lone_replica_computes_with_the_whole_machine(tmp_path):
    recipe = recipe_from_dict(json.loads(write_job(tmp_path).read_text())["recipe"])
    teacher = recipe.teachers[0]
    assert threads_of(teacher, recipe, cluster_cpus=8) == 8
    pair = recipe.model_copy(update={"teachers": (teacher, teacher)})
    assert threads_of(teacher, pair, cluster_cpus=8) == 4
    joined = recipe.model_copy(update={"cluster": recipe.cluster.model_copy(update={"address": "auto"})})
    assert threads_of(teacher, joined, cluster_cpus=8) == 1


def test_the_progress_line_has_done_total_throughput_and_time_left():
    progress = Progress("capture a", total=40, done=10)
    progress.advance(10, 5000)
    assert progress.line().startswith("capture a: 20/40 units, ")
    assert "tokens/s" in progress.line()
    assert progress.line().endswith("0:00 left")


def interrupt(job, sent, committed):
    """Start the job and send it a signal once more than `committed` units are; returns its output."""
    process, ends_s = start(job), time.monotonic() + 120
    while len(committed_units(cache_of(job))) <= committed:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < ends_s, "no unit was committed"
        time.sleep(0.05)
    os.kill(process.pid, sent)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "interrupted: the same command continues from here" in output
    return output


@pytest.mark.slow
def test_an_interrupt_keeps_what_is_committed_the_next_start_continues_and_a_finished_job_needs_no_ray(tmp_path):
    job = write_job(tmp_path, rows=96, delay_s_per_token=0.005)
    done = 0
    units = re.compile(r"(\d+) of (4[89]) units committed")  # an odd number of rows on a side makes one unit more
    for sent in (signal.SIGINT, signal.SIGTERM):
        output = interrupt(job, sent, done)
        assert (found := units.search(output)), output
        assert int(found[1]) == done
        assert done < len(committed_units(cache_of(job))) < int(found[2])
        done = len(committed_units(cache_of(job)))

    process = start(job)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert f"{done} of 4" in output
    assert "usable" in output

    script = "import sys; from actors.capture import main; code = main(sys.argv[1:]); print(code, 'ray' in sys.modules)"
    again = subprocess.run([sys.executable, "-c", script, str(job)], capture_output=True, text=True, check=True)
    assert "done already" in again.stderr
    assert again.stdout.splitlines()[-1] == "0 False"


@pytest.mark.slow
def test_a_teacher_that_cannot_continue_is_one_line_and_exit_code_1(tmp_path, two_cpus_of_ray, capfd):
    assert main([str(write_job(tmp_path, error_every=1))]) == 1
    output = capfd.readouterr()
    errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: teacher a: ")
    assert "Traceback" not in output.err
