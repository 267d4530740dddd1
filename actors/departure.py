"""How a process leaves whose engine is dead: with its last words, and for good."""

import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import EngineDead

LAST_WORDS_S = 0.25
"""Between telling the supervisor that the engine is dead, and leaving."""

Answer = TypeVar("Answer")


class Departure:
    """Ends the process once an engine in it is dead. `exit_actor` would keep Ray from starting it anew."""

    def __init__(self) -> None:
        self._leaving = False

    def upon_death(self, work: Callable[[], Answer]) -> Answer:
        """The work's answer. On EngineDead: say so, then leave.

        Ray answers for the calls that are still here with ActorUnavailableError, and starts the actor anew.
        """
        try:
            return work()
        except EngineDead:
            self.hold()
            self._leaving = True
            threading.Timer(LAST_WORDS_S, os._exit, (1,)).start()
            raise

    def hold(self) -> None:
        """Never return from a process that is leaving: what comes now is for its next incarnation to answer."""
        if self._leaving:
            time.sleep(100 * LAST_WORDS_S)
