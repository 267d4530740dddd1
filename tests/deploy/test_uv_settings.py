import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "uv_settings.py"


@pytest.fixture
def exported(tmp_path):
    """The variables of a shell that evaluates the script's output, for a pip.conf and environment variables."""

    def run(configuration, **variables):
        (tmp_path / "pip.conf").write_text(configuration)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_", "SSL_"))}
        no_other = {"HOME": str(tmp_path), "XDG_CONFIG_DIRS": str(tmp_path / "none")}
        environment = clean | no_other | {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf")} | variables
        done = subprocess.run(
            ["bash", "-c", 'eval "$("$0" "$1")" && env -0', sys.executable, str(SCRIPT)],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        variables = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if "=" in entry)
        return {k: v for k, v in variables.items() if k.startswith(("UV_", "SSL_", "ALL_"))}

    return run


def test_indexes_and_wheel_folders_are_exported(exported):
    settings = exported(
        "[global]\nindex-url = https://one/simple\nextra-index-url = https://two/simple\n  file:///three\n"
        "find-links = /wheels\n  /more wheels\ncert = /etc/ca.pem\n"
    )
    assert settings["UV_DEFAULT_INDEX"] == "https://one/simple"
    assert settings["UV_INDEX"] == "https://two/simple file:///three"
    assert settings["UV_FIND_LINKS"] == "/wheels,/more,wheels"  # pip, too, separates at every space
    assert settings["SSL_CERT_FILE"] == "/etc/ca.pem"
    assert settings["UV_INDEX_STRATEGY"] == "unsafe-best-match"


def test_precedence_is_that_of_pip(exported):
    configuration = "[global]\nindex-url = https://global\nno-index = false\n[install]\nindex-url = https://install\n"
    assert exported(configuration)["UV_DEFAULT_INDEX"] == "https://install"
    assert exported(configuration, PIP_INDEX_URL="https://env")["UV_DEFAULT_INDEX"] == "https://env"


def test_values_are_quoted_for_the_shell(exported):
    assert exported("[global]\nindex-url = https://a/$(touch)/'b'\n")["UV_DEFAULT_INDEX"] == "https://a/$(touch)/'b'"


def test_without_settings_only_the_index_strategy_is_exported(exported):
    assert exported("", PIP_CONFIG_FILE=os.devnull) == {"UV_INDEX_STRATEGY": "unsafe-best-match"}
