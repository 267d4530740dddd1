"""Keeps one writer at work, whatever happens to its process. Each clerk is a thread that waits for one call at a time.

Since only one batch is with a writer, a death says which batch it was: that is tried again, and only if the engine goes
down with it a second time is it halved, down to the prompt. Ray brings the process back; what is left to do here is to
notice that it is gone or silent, and to ask for a new one where Ray gives it up.
"""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from actors.causes import cause_of, is_for_good, said
from actors.lease import Lease, Outcome
from actors.losses import Losses
from actors.patience import Patience
from actors.placement import Site
from actors.scribe import Commission, Scribe
from actors.suspects import Inquest
from pipeline.config import TeacherSpec
from pipeline.corpus.answers import PromptBatch
from pipeline.errors import EngineDead, EngineError, StillhouseError
from pipeline.planning.resources import Placement, is_idle

TICK_S = 0.2


class Orders(Protocol):
    """Where a clerk has batches from, and whom it tells what became of them."""

    teacher: TeacherSpec
    commission: Commission
    placement: Placement
    losses: Losses
    patience: Patience
    closed: bool
    """No batch is wanted any more."""

    def has_work(self) -> bool:
        """Whether a batch is waiting to be written."""
        ...

    def take(self) -> PromptBatch | None:
        """The next batch, if no other clerk was faster."""
        ...

    def settle(self, batch: PromptBatch, outcome: Outcome) -> None:
        """The batch is written."""
        ...

    def fail(self, error: StillhouseError) -> None:
        """Nothing more will be written."""
        ...

    def waiting(self) -> AbstractContextManager[None]:
        """Inside, a writer waits for its place."""
        ...

    def others_wait(self) -> bool:
        """Whether other teachers' writers wait for a place."""
        ...


class _Fallen(Exception):
    """The writer's process is gone, or going."""


class _Announced(_Fallen):
    """Its engine has said so itself."""


class Clerk(threading.Thread):
    """Takes batches from a desk as long as there are some and the desk is open."""

    def __init__(self, desk: Orders) -> None:
        super().__init__(name=f"clerk of {desk.teacher.name}", daemon=True)
        self._desk, self._losses, self._patience = desk, desk.losses, desk.patience
        self._actor: Any = None
        self._site: Site | None = None
        self._serving = False
        self._node = ""

    def run(self) -> None:
        """Until the desk closes. A failure is the desk's to tell."""
        try:
            while (batch := self._next()) is not None:
                outcome = self._write(batch)
                if outcome is not None:
                    self._desk.settle(batch, outcome)
        except StillhouseError as error:
            self._desk.fail(error)
        except Exception as error:  # whatever it is, those who wait for an answer must hear of it
            self._desk.fail(EngineError(f"teacher {self._desk.teacher.name}: {type(error).__name__}: {error}"))
        finally:
            self._leave()

    def _next(self) -> PromptBatch | None:
        """The next batch, taken only once there is an engine for it; None when the desk is closed."""
        while not self._desk.closed:
            if not self._desk.has_work():
                if self._desk.others_wait():
                    self._leave()  # teachers whose answers are read in turn must not wait for each other's places
                time.sleep(TICK_S)
            elif self._open(self._desk.has_work) and (batch := self._desk.take()) is not None:
                return batch
        return None

    def _write(self, batch: PromptBatch) -> Outcome | None:
        """None where the desk has closed meanwhile. Raises what no other process could mend."""
        inquest: Inquest | None = None
        while self._open(lambda: True):
            lease = Lease(batch.path) if inquest is None else inquest.lease()
            try:
                outcome: Outcome = self._ask(self._actor.write.remote(lease, batch), self._patience.deadline_s())
            except _Fallen as death:
                if self._losses.is_gone(self._node):
                    continue  # it went with its machine
                self._losses.died(self._node, str(death))
                if inquest is None:
                    announced = str(death) if isinstance(death, _Announced) else None
                    inquest = Inquest(batch.path, batch.names, announced)
                else:
                    inquest.died(str(death))
                continue
            self._losses.worked()
            self._patience.learn(outcome)
            if inquest is None or inquest.survived():
                return outcome
        return None

    def _open(self, needed: Callable[[], bool]) -> bool:
        """Come to an open engine. False where the desk closes, or nobody needs it any more while it has no place."""
        while not self._serving and not self._desk.closed:
            try:
                if not self._arrive(needed):
                    return False
                self._ask(self._actor.open.remote(), self._patience.opening_s)
            except _Fallen as death:
                self._losses.did_not_open(self._node, str(death))
            else:
                self._losses.opened()
                self._serving = True
        return self._serving and not self._desk.closed

    def _arrive(self, needed: Callable[[], bool]) -> bool:
        if self._actor is None:
            self._node, self._site = "", Site(self._desk.placement)
            self._actor = ray.remote(Scribe).options(**self._site.options()).remote(self._desk.commission)
        ref = self._actor.arrive.options(max_task_retries=-1).remote()  # over restarts: there is a process again
        idle_since_s: float | None = None
        with self._desk.waiting():
            while not ray.wait([ref], timeout=TICK_S)[0]:
                if self._desk.closed or not needed():
                    self._leave()
                    return False
                idle = is_idle(self._desk.placement, ray.cluster_resources(), ray.available_resources())
                idle_since_s = (idle_since_s or time.monotonic()) if idle else None
                if idle_since_s is not None and time.monotonic() - idle_since_s > self._patience.arrival_s:
                    self._leave()
                    raise _Fallen(
                        f"no place after {self._patience.arrival_s:.0f} s, though nothing else runs; "
                        "see teachers.placement"
                    )
        self._node = self._answer(ref).node
        return True

    def _ask(self, ref: Any, limit_s: float) -> Any:
        """The answer, if it comes within that time and from a process that lives; _Fallen otherwise."""
        started_s = time.monotonic()
        while not ray.wait([ref], timeout=TICK_S)[0]:
            if self._desk.closed:
                self._leave()
                raise _Fallen("the desk is closed")
            if time.monotonic() - started_s > limit_s:
                self._serving = False
                ray.kill(self._actor, no_restart=False)
                raise _Fallen(f"the engine did not answer for {limit_s:.0f} s")
        return self._answer(ref)

    def _answer(self, ref: Any) -> Any:
        try:
            return ray.get(ref)
        except EngineDead as error:
            self._serving = False
            raise _Announced(said(error)) from error
        except StillhouseError as error:
            raise error.cause if isinstance(error, RayTaskError) else error from None
        except RayTaskError as error:
            name = self._desk.teacher.name
            raise EngineError(f"teacher {name}: {type(error.cause).__name__}: {error.cause}") from error
        except RayError as error:
            self._serving = False
            if is_for_good(error):
                self._leave()
            raise _Fallen(cause_of(error)) from error

    def _leave(self) -> None:
        """Give the engine's memory and its place back."""
        self._serving = False
        if self._actor is not None:
            ray.kill(self._actor, no_restart=True)
            self._actor = None
        if self._site is not None:
            self._site.release()
            self._site = None
