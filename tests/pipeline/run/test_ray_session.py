"""Settings of a Ray session, without a Ray."""

import json

import pytest

from pipeline.run.logs import FORMAT_VARIABLE, LEVELS_VARIABLE
from pipeline.run.ray_session import _log_options, _log_variables


def test_workers_get_the_log_settings_that_a_submitted_job_does_not_set_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEVELS_VARIABLE, "debug")
    monkeypatch.setenv(FORMAT_VARIABLE, "json")
    assert _log_variables() == {LEVELS_VARIABLE: "debug", FORMAT_VARIABLE: "json"}
    submitted = {"runtime_env": {"env_vars": {FORMAT_VARIABLE: "json", "OTHER": "1"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(submitted))
    assert _log_variables() == {LEVELS_VARIABLE: "debug"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert len(_log_variables()) == 2


@pytest.mark.parametrize(("setting", "level", "forwarded"), [("", "ERROR", False), ("info,ray=info", "INFO", True)])
def test_workers_output_is_forwarded_only_where_rays_log_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, setting: str, level: str, forwarded: bool
) -> None:
    monkeypatch.setenv(LEVELS_VARIABLE, setting)
    assert _log_options() == {"logging_level": level, "log_to_driver": forwarded}
