import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "uv_settings.py"


@pytest.fixture
def told(tmp_path):
    """What a shell holds that has evaluated the script's words, for a pip.conf and an environment."""

    def told(configuration, **variables):
        (tmp_path / "pip.conf").write_text(configuration)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_", "SSL_"))}
        nowhere = {"HOME": str(tmp_path), "XDG_CONFIG_DIRS": str(tmp_path / "none")}
        environment = clean | nowhere | {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf")} | variables
        done = subprocess.run(
            ["bash", "-c", 'eval "$("$0" "$1")" && env -0', sys.executable, str(SCRIPT)],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        everything = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if "=" in entry)
        return {k: v for k, v in everything.items() if k.startswith(("UV_", "SSL_", "ALL_"))}

    return told


def test_indexes_and_folders_of_wheels_are_handed_over(told):
    settings = told(
        "[global]\nindex-url = https://one/simple\nextra-index-url = https://two/simple\n  file:///three\n"
        "find-links = /wheels\n  /more wheels\ncert = /etc/ca.pem\n"
    )
    assert settings["UV_DEFAULT_INDEX"] == "https://one/simple"
    assert settings["UV_INDEX"] == "https://two/simple file:///three"
    assert settings["UV_FIND_LINKS"] == "/wheels,/more,wheels"  # pip, too, separates at every space
    assert settings["SSL_CERT_FILE"] == "/etc/ca.pem"
    assert settings["UV_INDEX_STRATEGY"] == "unsafe-best-match"


def test_later_settings_win_as_they_do_with_pip(told):
    configuration = "[global]\nindex-url = https://global\nno-index = false\n[install]\nindex-url = https://install\n"
    assert told(configuration)["UV_DEFAULT_INDEX"] == "https://install"
    assert told(configuration, PIP_INDEX_URL="https://env")["UV_DEFAULT_INDEX"] == "https://env"


def test_words_that_a_shell_would_run_stay_words(told):
    assert told("[global]\nindex-url = https://a/$(touch)/'b'\n")["UV_DEFAULT_INDEX"] == "https://a/$(touch)/'b'"


def test_without_settings_only_the_strategy_is_said(told):
    assert told("", PIP_CONFIG_FILE=os.devnull) == {"UV_INDEX_STRATEGY": "unsafe-best-match"}
