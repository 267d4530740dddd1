"""The Ray session of a job: started on this machine, or a connection to a cluster."""

import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.config import ClusterSpec
from pipeline.errors import StillhouseError, UsageError
from pipeline.run.logs import level_of, log_environment

CONNECT_S = 10.0
"""Timeout for a cluster's port; Ray itself retries for minutes."""


@contextmanager
def ray_session(cluster: ClusterSpec, local_cpus: int | None = None) -> Iterator[None]:
    """Start Ray on this machine, or connect to a cluster, and shut down at the end, which ends this job's actors.

    `local_cpus`: CPUs of a local Ray where `cluster.cpus` is unset; None: all. A Ray that is initialised already is
    used and left running. SIGTERM raises KeyboardInterrupt, since Ray's own handler ends the process with a stack
    trace. Raises UsageError where no cluster answers at the address, StillhouseError where Ray does not start here.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    if cluster.address == "local":
        _start_here(cluster.cpus or local_cpus)
    else:
        _join(cluster.address)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        ray.shutdown()


def _start_here(cpus: int | None) -> None:
    import ray

    try:
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **_log_options())
    except Exception as error:  # Ray has no error type for this
        raise StillhouseError(f"Ray did not start on this machine: {' '.join(str(error).split())}") from error


def _join(address: str) -> None:
    import ray

    try:
        _check_port(address)
        ray.init(address=address, runtime_env={"env_vars": _log_variables()}, **_log_options())
    except (OSError, ValueError, OverflowError, RuntimeError) as error:
        raise UsageError(
            f"cluster.address: expected a Ray cluster at {address}, got: {' '.join(str(error).split())}; "
            "start one there, or set cluster.address=local"
        ) from error


def _log_variables() -> dict[str, str]:
    """Log settings for the workers, but for those that a submitted Ray job sets itself: Ray refuses duplicates."""
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    own = (submitted.get("runtime_env") or {}).get("env_vars") or {}
    return {name: value for name, value in log_environment().items() if name not in own}


def _log_options() -> dict[str, Any]:
    """Workers' output reaches this terminal only where Ray's own log is asked for."""
    level = level_of("ray")
    return {"logging_level": level, "log_to_driver": level in ("DEBUG", "INFO")}


def _check_port(address: str) -> None:
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
