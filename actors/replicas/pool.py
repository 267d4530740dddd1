"""Pools of replicas, one per teacher: each serves a `Work` until it is finished, whichever processes die meanwhile.

Ray schedules the actors, restarts dead ones, and queues those that do not fit, so teachers run side by side where
resources allow and one after the other where not. A pool decides which replica serves which item and how many replicas
there are; it repeats the items of dead replicas, kills hung ones, and searches for the rows that kill engines.
"""

import logging
import time
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import ray

from actors.replicas.failure_budget import FailureBudget
from actors.replicas.metrics import PoolMetrics, PoolStats
from actors.replicas.placement import living_nodes, threads_of
from actors.replicas.poison_rows import PoisonRowSearches, max_quarantined
from actors.replicas.ray_errors import ReplicaDied, result_of
from actors.replicas.replica import Replica, ReplicaState
from actors.replicas.timeouts import Timeouts
from actors.replicas.work import Work, WorkItem, WorkResult
from pipeline.config import Recipe
from pipeline.errors import EngineError, StillhouseError
from pipeline.planning.resources import check_fits, is_idle, placement_for, replicas_that_fit

logger = logging.getLogger(__name__)

TICK_S = 0.2
CLOSE_S = 20.0
"""For engines of several ranks to close themselves after a finished run. All others are killed at once: their memory is
that of the actor's process."""

WorkT = TypeVar("WorkT", bound=Work)


def run_pools(pools: "Sequence[ReplicaPool[Any]]") -> None:
    """Run until every pool is finished or has failed. Raises the first failure, after the other pools have ended."""
    try:
        while active := [pool for pool in pools if not pool.finished]:
            for pool in active:
                pool.tick()
                if any(other.lacks_resources() for other in active if other is not pool):
                    pool.release_idle()
            _receive_results(active)
            for pool in active:
                if pool.finished:
                    pool.shutdown()
    finally:
        for pool in pools:
            pool.shutdown()
    for pool in pools:
        if pool.failure is not None:
            raise pool.failure


def _receive_results(pools: "Sequence[ReplicaPool[Any]]") -> None:
    """Wait for a result, at most one tick, and pass on all that are there."""
    owners = {ref: pool for pool in pools for ref in pool.refs()}
    if not owners:
        time.sleep(TICK_S)
        return
    ray.wait(list(owners), timeout=TICK_S)
    for ref in ray.wait(list(owners), num_returns=len(owners), timeout=0)[0]:
        owners[ref].receive(ref)


class ReplicaPool(Generic[WorkT]):
    """The replicas of one teacher. Raises RecipeError where not even one fits into a local cluster."""

    def __init__(
        self, recipe: Recipe, work: WorkT, timeouts: Timeouts | None = None, stats: PoolStats | None = None
    ) -> None:
        teacher, cluster = work.teacher, ray.cluster_resources()
        self.work = work
        self.stats = stats or PoolStats()
        self.failure: StillhouseError | None = None
        self._placement = placement_for(teacher, cluster)
        if recipe.cluster.address == "local":
            check_fits(teacher, self._placement, cluster)
        self._min_replicas, self._max_replicas = teacher.replica_range
        if work.may_grow:  # replicas that can never be scheduled would make other pools release theirs
            self._max_replicas = min(self._max_replicas, replicas_that_fit(self._placement, cluster))
        self._threads = threads_of(teacher, recipe, int(cluster.get("CPU", 1)))
        self._quarantine_cap = recipe.capture.quarantine_cap
        self._timeouts = timeouts or Timeouts(work.tokens_per_item)
        self._budget = FailureBudget(teacher.name, self._max_replicas, work.rows_per_item, living_nodes)
        self._metrics = PoolMetrics(teacher.name, work.job, work.item_noun)
        self._searches = PoisonRowSearches()
        self._replicas: list[Replica] = []
        self._last_tick_s = time.monotonic()

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do, or the pool has failed."""
        return self.failure is not None or self.work.finished

    def refs(self) -> list[Any]:
        """References of all calls in flight."""
        return [ref for replica in self._replicas for ref in replica.refs()]

    def is_pending(self) -> bool:
        """Whether a replica waits for resources."""
        return bool(self._in(ReplicaState.PENDING))

    def lacks_resources(self) -> bool:
        """Whether it has fewer scheduled replicas than it needs at least: other pools release idle ones for these."""
        scheduled = len(self._replicas) - len(self._in(ReplicaState.PENDING))
        return self.is_pending() and scheduled < min(self._min_replicas, self._wanted_replicas())

    def tick(self) -> None:
        """Scale, assign items, and replace replicas that hang or cannot be scheduled."""
        try:
            self._scale()
            self._assign_items()
            for replica in self._replicas:
                replica.kill_if_hung(self._timeouts)
            self._replace_unscheduled()
        except StillhouseError as error:
            self._fail(error)
        self._measure()

    def receive(self, ref: Any) -> None:
        """Handle the result of a call, or its failure. A failed pool ignores what is still in flight."""
        if self.failure is not None:
            return
        try:
            for replica in [replica for replica in self._replicas if ref in replica.refs()]:
                self._handle(replica, ref)
        except StillhouseError as error:
            self._fail(error)

    def release_idle(self, *, pending_only: bool = False) -> None:
        """Shut down replicas that have no item and are more than the queue needs."""
        idle = [r for r in self._replicas if not r.items and (r.state is ReplicaState.PENDING or not pending_only)]
        idle.sort(key=lambda replica: list(ReplicaState).index(replica.state))  # those that are ready go last
        for replica in idle[: max(0, len(self._replicas) - self._wanted_replicas())]:
            self._shut_down(replica)

    def shutdown(self) -> None:
        """Shut down all replicas and release their resources."""
        has_ranks = self.work.teacher.ranks > 1 and self.work.finished and self.failure is None
        if closing := [replica.actor.close.remote() for replica in self._in(ReplicaState.RUNNING) if has_ranks]:
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_S)
        for replica in list(self._replicas):
            self._shut_down(replica)
        self.work.progress.close()

    # Results and failures

    def _handle(self, replica: Replica, ref: Any) -> None:
        item = replica.items.pop(ref, None)
        awaits_location = replica.awaits_location(ref)
        try:
            result = result_of(ref, self.work.teacher.name)
        except ReplicaDied as death:
            if not death.reported:
                death.message = replica.kill_reason or death.message
                death.permanent = death.permanent or awaits_location
            self._handle_death(replica, item, death)
            return
        replica.record_reply()
        if isinstance(result, WorkResult):
            self._timeouts.learn(result)
        if item is not None:
            self._complete(item, result)
        else:
            self._advance(replica, result)

    def _advance(self, replica: Replica, result: Any) -> None:
        running = replica.advance(result)
        state = replica.state.name
        logger.debug("teacher %s: a replica on node %s is %s", self.work.teacher.name, replica.node_id, state)
        if running:
            self._budget.record_start()
            if not self.stats.items and len(self._in(ReplicaState.RUNNING)) == 1:
                self.work.progress.restart_clock()

    def _complete(self, item: WorkItem, result: Any) -> None:
        self._budget.record_success()
        if not self._searches.record_success(item):
            return
        if isinstance(result, WorkResult):
            self.stats.add(result)
            self._check_quarantine_cap()
        self.work.complete(item, result)

    def _check_quarantine_cap(self) -> None:
        work, quarantined = self.work, self.stats.quarantined
        allowed = max_quarantined(self._quarantine_cap, work.total_rows)
        if quarantined > allowed:
            raise EngineError(
                f"teacher {work.teacher.name}: {quarantined} {work.row_noun} quarantined, expected at most "
                f"{allowed} of {work.total_rows} (capture.quarantine_cap); see {work.store.where('quarantine')}"
            )

    def _handle_death(self, replica: Replica, item: WorkItem | None, death: ReplicaDied) -> None:
        """Count the death once, however many calls were in flight, and queue the items again."""
        node_lost = self._budget.is_lost(replica.node_id)
        if not replica.dead:
            fate = ", which is lost" if node_lost else ""
            name, node = self.work.teacher.name, replica.node_id or "(not scheduled)"
            logger.warning("teacher %s: a replica failed on node %s%s: %s", name, node, fate, death.message)
        if not (replica.dead or node_lost):
            if replica.state is ReplicaState.RUNNING:
                self._budget.record_death(replica.node_id, death.message)
            elif replica.is_starting() or death.permanent:
                self._budget.record_failed_start(replica.node_id if replica.is_starting() else "", death.message)
        unrelated = replica.reported or node_lost
        items = [] if item is None else [item]
        if death.permanent:
            items += replica.items.values()
            self._shut_down(replica)
        else:
            replica.mark_dead(reported=death.reported)
        for lost in items:
            self._retry(lost, death, unrelated=unrelated)

    def _retry(self, item: WorkItem, death: ReplicaDied, *, unrelated: bool) -> None:
        """Queue an item of a dead replica again. `unrelated`: it cannot have caused the death."""
        self.stats.retries += 1
        self._metrics.count_retry()
        if unrelated:
            searched = self._searches.put_back(item)
        else:
            searched = self._searches.record_death(item, self.work.row_ids, death.message, reported=death.reported)
        if not searched:
            self.work.queue.put_back(item)

    def _fail(self, error: StillhouseError) -> None:
        if self.failure is None:  # replicas may die together: the first failure tells the cause
            self.failure = error
            self.work.fail(error)

    # Assignment and scaling

    def _assign_items(self) -> None:
        """Items that have to be tried alone go to the replica with the fewest items; the others stay busy meanwhile."""
        running = sorted(self._in(ReplicaState.RUNNING), key=lambda replica: len(replica.items))
        for replica in running:
            if self._searches and not replica.items:
                self._assign(replica, self._searches.next_item(), exclusive=True)
            if replica.exclusive or (self._searches and replica is running[0]):
                continue
            while self.work.queue and len(replica.items) < self.work.calls_per_replica:
                self._assign(replica, self.work.queue.pop())

    def _assign(self, replica: Replica, item: WorkItem, *, exclusive: bool = False) -> None:
        replica.assign(self.work.submit(replica.actor, item), item, exclusive=exclusive)

    def _wanted_replicas(self) -> int:
        in_flight = sum(len(replica.items) for replica in self._replicas)
        items = len(self.work.queue) + len(self._searches) + in_flight
        return min(self._max_replicas, max(-(-items // self.work.calls_per_replica), min(self._min_replicas, items)))

    def _scale(self) -> None:
        """Above the minimum, replicas are created one at a time, each once the one before is scheduled."""
        wanted, pending = self._wanted_replicas(), self.is_pending()
        while len(self._replicas) < wanted and (len(self._replicas) < self._min_replicas or not pending):
            self._replicas.append(Replica.create(self.work, self._placement, self._threads))
            pending = True
        self.release_idle(pending_only=self.work.may_grow)

    def _shut_down(self, replica: Replica) -> None:
        self._replicas.remove(replica)
        replica.shutdown()

    def _replace_unscheduled(self) -> None:
        """A replica that Ray does not schedule in an idle cluster will not be scheduled later."""
        if not (pending := self._in(ReplicaState.PENDING)):
            return
        idle = is_idle(self._placement, ray.cluster_resources(), ray.available_resources())
        limit_s = self._timeouts.schedule_s
        for replica in pending:
            if replica.unscheduled_s(cluster_idle=idle) > limit_s:
                message = f"not scheduled within {limit_s:.0f} s in an idle cluster; see teachers.placement"
                self._handle_death(replica, None, ReplicaDied(message, permanent=True))

    def _in(self, state: ReplicaState) -> list[Replica]:
        return [replica for replica in self._replicas if replica.state is state]

    def _measure(self) -> None:
        now_s = time.monotonic()
        running = len(self._in(ReplicaState.RUNNING))
        if not self.work.closing:
            self.stats.running_s += running * (now_s - self._last_tick_s)
        self._last_tick_s = now_s
        self._metrics.record(len(self.work.queue) + len(self._searches), running, self.stats.bytes_per_token())
        requested = ", ".join(f"{amount:g} {name}" for name, amount in self._placement.total.items())
        starting = any(replica.is_starting() for replica in self._replicas)
        note = "the engine is opening" if starting else f"waiting for {requested}"
        self.work.progress.beat("" if running or not self._replicas else note)
