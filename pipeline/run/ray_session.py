"""A job's Ray session: one of its own on this machine, or a cluster that is joined by its address."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.config import ClusterSpec
from pipeline.errors import StillhouseError, UsageError

CONNECT_S = 10.0
"""For a cluster's port to answer; Ray itself would try for minutes."""
_QUIET = {"logging_level": "ERROR", "log_to_driver": False}


@contextmanager
def ray_session(cluster: ClusterSpec, local_cpus: int | None = None) -> Iterator[None]:
    """Start Ray on this machine, or join a cluster; leave it in the end, and with it every actor's memory.

    `local_cpus` is what one on this machine offers where `cluster.cpus` is unset; None: all CPUs. A process that has
    joined a cluster already stays in it. SIGTERM becomes KeyboardInterrupt: Ray's own handler ends the process with a
    stack trace. Raises UsageError where no cluster answers at the address, StillhouseError where none starts here.
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
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **_QUIET)
    except Exception as error:  # Ray has no type of its own for this
        raise StillhouseError(f"Ray did not start on this machine: {' '.join(str(error).split())}") from error


def _join(address: str) -> None:
    import ray

    try:
        _check_port(address)
        ray.init(address=address, **_QUIET)
    except (OSError, ValueError, OverflowError, RuntimeError) as error:
        raise UsageError(
            f"cluster.address: expected a Ray cluster at {address}, got: {' '.join(str(error).split())}; "
            "start one there, or set cluster.address=local"
        ) from error


def _check_port(address: str) -> None:
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
