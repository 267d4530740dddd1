"""One replica of a teacher as its supervisor sees it, and the crew's ledger."""

import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import ray

from actors.lease import Lease, Outcome
from actors.placement import Site
from actors.teacher import CALLS_AT_A_TIME, Posting, Teacher
from pipeline.planning.resources import Placement


class State(Enum):
    """How far a replica has come."""

    WAITING = "for a place in the cluster, or to be brought back"
    OPENING = "its engine"
    WARMING = "scores a first row"
    SERVING = "takes leases"


@dataclass
class Ledger:
    """What a crew has done in this run. Times are summed over replicas."""

    units: int = 0
    rows: int = 0
    tokens: int = 0
    stored_bytes: int = 0
    score_s: float = 0.0
    store_s: float = 0.0
    serving_s: float = 0.0
    retries: int = 0
    casualties: int = 0
    """Rows in quarantine, those of earlier runs included."""

    def add(self, outcome: Outcome) -> None:
        """One more unit is committed."""
        self.units += 1
        self.rows += outcome.rows
        self.tokens += outcome.tokens
        self.stored_bytes += outcome.stored_bytes
        self.score_s += outcome.score_s
        self.store_s += outcome.store_s
        self.casualties += outcome.casualties

    def bytes_per_token(self) -> float:
        """Stored bytes a token; 0 before the first."""
        return self.stored_bytes / self.tokens if self.tokens else 0.0

    def bottleneck(self) -> str:
        """Which side the run waited for, with its share of the replicas' time."""
        if self.serving_s <= 0:
            return "nothing ran"
        sides = {"the teacher's engine": self.score_s, "encoding and storage": self.store_s}
        side, busy_s = max(sides.items(), key=lambda item: item[1])
        share = min(busy_s / self.serving_s, 1.0)
        return f"{side} (busy {share:.0%})" if share >= 0.5 else f"feeding the replicas ({side} busy {share:.0%} only)"


@dataclass(eq=False)
class Replica:
    """An actor, its place, and the leases that it holds."""

    actor: Any
    site: Site
    state: State = State.WAITING
    leases: dict[Any, Lease] = field(default_factory=dict)
    alone: bool = False
    """Holds a suspect: gets nothing beside it."""
    announced: bool = False
    """Its engine's death was told by the actor itself, which named the unit; the other leases are innocent."""
    fallen: bool = False
    """Its death is counted, and it has not come back since."""
    silence: str = ""
    """Why it was killed, if it was silent for too long."""
    node: str = ""
    """Where it last arrived."""
    _control: Any = None
    _idle_since_s: float | None = None
    _heard_s: float = field(default_factory=time.monotonic)
    _serving_since_s: float | None = None
    _served_s: float = 0.0

    @classmethod
    def hire(cls, posting: Posting, placement: Placement) -> "Replica":
        """Ask the cluster for one more. It arrives when there is room."""
        site = Site(placement)
        options = site.options() | {"max_concurrency": CALLS_AT_A_TIME + 1}
        replica = cls(ray.remote(Teacher).options(**options).remote(posting), site)
        replica._await_arrival()
        return replica

    def refs(self) -> list[Any]:
        """Every answer that is due."""
        return [*self.leases, *([self._control] if self._control is not None else [])]

    def advance(self, answer: Any) -> bool:
        """The control call is answered: on to opening, to warming up, to serving. True when it serves now."""
        if self.state is State.WAITING:
            self.state, self.node = State.OPENING, answer.node
            self.announced, self.fallen, self.silence = False, False, ""
            self._control = self.actor.open.remote()
            return False
        if self.state is State.OPENING:
            self.state = State.WARMING
            self._control = self.actor.warm_up.remote()
            return False
        self._control = None
        self.state = State.SERVING
        self._serving_since_s = time.monotonic()
        return True

    def lend(self, ref: Any, lease: Lease, *, alone: bool) -> None:
        """It holds one more lease."""
        if not self.leases:
            self.heard()
        self.leases[ref] = lease
        self.alone = alone

    def fall(self, announced: bool) -> None:
        """Its process is gone or going. Ray brings it back; it must arrive and open again."""
        self.announced = self.announced or announced
        self.alone, self.fallen = False, True
        if self.state is not State.WAITING:
            self.state = State.WAITING
            self._served_s, self._serving_since_s = self.clock_out(), None
            self._await_arrival()

    def heard(self) -> None:
        """It gave a sign of life."""
        self._heard_s = time.monotonic()
        self.alone = False if not self.leases else self.alone

    def silent_s(self) -> float:
        """Seconds since the last sign of life."""
        return time.monotonic() - self._heard_s

    def owes_an_answer(self) -> bool:
        """It has a place and something to do, and was not given up yet."""
        return not self.silence and (self.is_opening() or bool(self.leases))

    def is_opening(self) -> bool:
        """It has a place, and its engine is not ready yet."""
        return self.state in (State.OPENING, State.WARMING)

    def is_arriving(self, ref: Any) -> bool:
        """Whether this is the call that Ray repeats over restarts. Once it fails, the replica will not come back."""
        return self.state is State.WAITING and ref == self._control

    def passed_over_s(self, *, cluster_idle: bool) -> float:
        """Seconds that it has waited for a place, without a break, though the cluster was idle. Call at every look."""
        now_s = time.monotonic()
        if self.state is not State.WAITING or not cluster_idle:
            self._idle_since_s = None
        elif self._idle_since_s is None:
            self._idle_since_s = now_s
        return 0.0 if self._idle_since_s is None else now_s - self._idle_since_s

    def is_at_its_engine(self) -> bool:
        """What it owes takes about as long as a unit: it neither opens nor reads every commit there is."""
        return self.state is not State.OPENING and not any(lease.closing for lease in self.leases.values())

    def kill(self, reason: str) -> None:
        """End its process; Ray starts a new one, and its leases come back as failed."""
        self.silence = reason
        ray.kill(self.actor, no_restart=False)

    def clock_out(self) -> float:
        """Seconds that its engine was open, since it last clocked out."""
        now_s = time.monotonic()
        served_s = self._served_s + (0.0 if self._serving_since_s is None else now_s - self._serving_since_s)
        self._served_s, self._serving_since_s = 0.0, None if self._serving_since_s is None else now_s
        return served_s

    def leave(self) -> None:
        """End it for good and give its place back."""
        ray.kill(self.actor, no_restart=True)
        self.site.release()

    def _await_arrival(self) -> None:
        """Ray repeats this one call over restarts, so that its answer means: there is a process again."""
        self._control = self.actor.arrive.options(max_task_retries=-1).remote()
