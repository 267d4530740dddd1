"""What the Ray actor of every replica does, whatever its work: it says where it runs and exits when its engine died."""

import os
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import ray

from actors.replicas.work import ReplicaLocation
from pipeline.errors import EngineDead, StillhouseError
from pipeline.run.logs import configure_logging

EXIT_DELAY_S = 0.25
"""Between the reply that the engine is dead and the exit of the process."""

EngineT = TypeVar("EngineT")
Result = TypeVar("Result")


class ReplicaActor(Generic[EngineT]):
    """Base class of the actors. A subclass adds `open`, `warm_up`, `close` and the methods that serve items."""

    def __init__(self, teacher: str, threads: int) -> None:
        configure_logging()
        os.environ["OMP_NUM_THREADS"] = str(threads)  # Ray sets it to 1; torch reads it when it is imported
        self._teacher = teacher
        self._engine: EngineT | None = None
        self._exiting = False

    def location(self) -> ReplicaLocation:
        """Return where the actor runs, as soon as Ray has scheduled it. A process about to exit never answers."""
        self._block_if_exiting()
        return ReplicaLocation(os.getpid(), ray.get_runtime_context().get_node_id())

    @property
    def _opened(self) -> EngineT:
        """The engine. Raises EngineDead if this process has none, since the one that opened it has died."""
        if self._engine is None:
            raise EngineDead(f"teacher {self._teacher}: the engine did not open")
        return self._engine

    def _open(self, open_engine: Callable[[], EngineT]) -> EngineT:
        """Open the engine. An unexpected error may have broken the process for good, as a CUDA error does."""
        try:
            return open_engine()
        except StillhouseError:
            raise
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise EngineDead(f"teacher {self._teacher}: the engine did not open: {message}") from error

    def _exit_on_dead_engine(self, call: Callable[[], Result]) -> Result:
        """Return the result of the call. On EngineDead: report it, then exit the process, so that Ray starts a new one.

        Ray answers the other calls in this process with ActorUnavailableError. After `exit_actor` it would not restart.
        """
        try:
            return call()
        except EngineDead:
            self._block_if_exiting()
            self._exiting = True
            threading.Timer(EXIT_DELAY_S, os._exit, (1,)).start()
            raise

    def _block_if_exiting(self) -> None:
        """Never return from a process that is about to exit: Ray repeats the call in the next one."""
        if self._exiting:
            time.sleep(100 * EXIT_DELAY_S)
