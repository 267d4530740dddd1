"""Checks of deploy/'s manifests, images and pinned lists that need neither a cluster nor KubeRay's schemas."""

import importlib.util
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.run.cli import cli

ROOT = Path(__file__).parent.parent.parent
MANIFESTS = sorted((ROOT / "deploy").glob("ray*.yaml"))

spec = importlib.util.spec_from_file_location("check_manifests", ROOT / "deploy" / "check_manifests.py")
assert spec is not None
assert spec.loader is not None
check_manifests = importlib.util.module_from_spec(spec)
sys.modules["check_manifests"] = check_manifests
spec.loader.exec_module(check_manifests)


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = manifest["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_both_jobs_have_a_manifest() -> None:
    assert [path.name for path in MANIFESTS] == ["rayjob-capture.yaml", "rayjob-train.yaml"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_entrypoint_images_and_ray_version_fit_this_version(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    assert manifest["spec"]["rayClusterSpec"]["rayVersion"] == version("ray")
    program, verb, *arguments = manifest["spec"]["entrypoint"].split()
    assert program == "stillhouse"
    context = cli.commands[verb].make_context(verb, arguments)
    assert context.params["recipe"] == "/etc/stillhouse/recipe.yaml"
    for pod in pods(manifest):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert re.fullmatch(rf"stillhouse:{re.escape(version('stillhouse'))}-(cpu|gpu)", container["image"])
            assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_the_head_has_no_cpus_and_workers_have_the_gpus(path: Path) -> None:
    cluster = yaml.safe_load(path.read_text())["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    head, *workers = [
        pod["containers"][0]["resources"]["limits"] for pod in pods({"spec": {"rayClusterSpec": cluster}})
    ]
    assert "nvidia.com/gpu" not in head
    assert all("nvidia.com/gpu" in worker for worker in workers)


def test_the_image_is_pinned_and_not_root() -> None:
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    base = next(line for line in lines if line.startswith("FROM "))
    assert re.search(r":\d+\.\d+\.\d+", base)
    assert "USER stillhouse" in lines
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    assert all((ROOT / word.replace("${DEVICE}", "cpu")).exists() for word in copied)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_pinned_list_has_versions_and_no_urls(device: str) -> None:
    lines = (ROOT / "deploy" / f"requirements-{device}.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+(\[[a-z,]+\])?==[A-Za-z0-9.+!]+", pin) for pin in pins), pins
    names = {pin.split("==")[0] for pin in pins}
    assert {"torch", "ray", "transformers"} <= names
    if device == "cpu":
        assert not names & {"torchvision", "torchaudio", "torchcodec"}
        assert not [name for name in names if name.startswith("nvidia-")]


def test_validation_reports_unknown_fields_and_wrong_types() -> None:
    fields = {"backoffLimit": {"type": "integer"}, "name": {"type": "string"}}
    known = {
        ("v1", "Job"): check_manifests.strict_schema(
            {"type": "object", "properties": {"spec": {"type": "object", "properties": fields}}}
        )
    }
    known["v1", "Job"]["properties"] |= {"apiVersion": {}, "kind": {}}
    good = {"apiVersion": "v1", "kind": "Job", "spec": {"backoffLimit": 3}}
    assert list(check_manifests.problems(good, known)) == []
    assert "backofLimit" in "".join(check_manifests.problems(good | {"spec": {"backofLimit": 3}}, known))
    assert "spec.backoffLimit" in "".join(check_manifests.problems(good | {"spec": {"backoffLimit": "3"}}, known))
    assert "no schema" in "".join(check_manifests.problems(good | {"kind": "Jub"}, known))
