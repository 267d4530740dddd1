"""One replica as its pool sees it: a Ray actor, its state, and the items that it serves."""

import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import ray

from actors.replicas.placement import ReplicaPlacement
from actors.replicas.timeouts import Timeouts
from actors.replicas.work import Work, WorkItem
from pipeline.planning.resources import Placement


class ReplicaState(Enum):
    """How far a replica has come."""

    PENDING = "Ray has not scheduled or not restarted its actor yet"
    STARTING = "its engine opens"
    WARMING_UP = "its engine processes a first row"
    RUNNING = "it serves items"


@dataclass(eq=False)
class Replica:
    """An actor, its placement, and the items in flight."""

    actor: Any
    placement: ReplicaPlacement
    state: ReplicaState = ReplicaState.PENDING
    items: dict[Any, WorkItem] = field(default_factory=dict)
    """By the reference of their result."""
    exclusive: bool = False
    """It serves an item that has to be tried alone, and gets no other."""
    reported: bool = False
    """The actor itself reported the engine's death and the item; the other items did not cause it."""
    dead: bool = False
    """Its death is counted, and it has not been restarted since."""
    kill_reason: str = ""
    """Why it was killed, if it hung."""
    node_id: str = ""
    """Where it last ran."""
    _control: Any = None
    """The reference of the call that leads to the next state."""
    _idle_cluster_since_s: float | None = None
    _last_reply_s: float = field(default_factory=time.monotonic)

    @classmethod
    def create(cls, work: Work, placement: Placement, threads: int) -> "Replica":
        """Create an actor. Ray schedules it once there are resources."""
        reserved = ReplicaPlacement(placement)
        replica = cls(work.create_actor(reserved.options(), threads), reserved)
        replica._await_location()
        return replica

    def refs(self) -> list[Any]:
        """References of all calls in flight."""
        return [*self.items, *([self._control] if self._control is not None else [])]

    def advance(self, result: Any) -> bool:
        """Go on to the next state with the result of the control call. True: it is RUNNING now."""
        if self.state is ReplicaState.PENDING:
            self.state, self.node_id = ReplicaState.STARTING, result.node_id
            self.reported, self.dead, self.kill_reason = False, False, ""
            self._control = self.actor.open.remote()
        elif self.state is ReplicaState.STARTING:
            self.state = ReplicaState.WARMING_UP
            self._control = self.actor.warm_up.remote()
        else:
            self.state = ReplicaState.RUNNING
            self._control = None
        return self.state is ReplicaState.RUNNING

    def assign(self, ref: Any, item: WorkItem, *, exclusive: bool) -> None:
        """Add an item in flight."""
        if not self.items:
            self.record_reply()
        self.items[ref] = item
        self.exclusive = exclusive

    def mark_dead(self, *, reported: bool) -> None:
        """Wait for Ray to restart the actor, which then must open its engine again."""
        self.reported = self.reported or reported
        self.exclusive, self.dead = False, True
        if self.state is not ReplicaState.PENDING:
            self.state = ReplicaState.PENDING
            self._await_location()

    def record_reply(self) -> None:
        """Restart the timeout."""
        self._last_reply_s = time.monotonic()
        self.exclusive = self.exclusive and bool(self.items)

    def is_starting(self) -> bool:
        """Whether it is scheduled and its engine is not ready yet."""
        return self.state in (ReplicaState.STARTING, ReplicaState.WARMING_UP)

    def awaits_location(self, ref: Any) -> bool:
        """Whether this is the call that Ray repeats over restarts. If it fails, Ray has given the actor up."""
        return self.state is ReplicaState.PENDING and ref == self._control

    def kill_if_hung(self, timeouts: Timeouts) -> None:
        """Kill the process if a call has had no reply for too long. Ray restarts it, and its calls fail."""
        at_engine = self.state is not ReplicaState.STARTING and all(item.at_engine for item in self.items.values())
        limit_s = timeouts.call_s() if at_engine else timeouts.start_s
        in_call = self.is_starting() or bool(self.items)
        if in_call and not self.kill_reason and time.monotonic() - self._last_reply_s > limit_s:
            self.kill_reason = f"the engine did not answer for {limit_s:.0f} s"
            ray.kill(self.actor, no_restart=False)

    def unscheduled_s(self, *, cluster_idle: bool) -> float:
        """Seconds for which it has been PENDING in an idle cluster without a break. Call it in every tick."""
        now_s = time.monotonic()
        if self.state is not ReplicaState.PENDING or not cluster_idle:
            self._idle_cluster_since_s = None
            return 0.0
        self._idle_cluster_since_s = self._idle_cluster_since_s or now_s
        return now_s - self._idle_cluster_since_s

    def shutdown(self) -> None:
        """Kill the actor for good and release its resources."""
        ray.kill(self.actor, no_restart=True)
        self.placement.release()

    def _await_location(self) -> None:
        """Ray repeats this call over restarts, so a reply means that the actor has a process (again)."""
        self._control = self.actor.location.options(max_task_retries=-1).remote()
