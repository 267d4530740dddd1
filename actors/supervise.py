"""Keeps teachers at work until their caches are whole, whatever happens to their processes.

Ray places the replicas, brings dead ones back, and queues those for which there is no room yet: teachers run side by
side where resources allow, and one after the other where not. What is left to do here is to know which unit is lent to
whom, to lend it again when its replica is gone, to notice engines that are silent for too long, and to find the rows
that bring engines down.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.backlog import Backlog
from actors.causes import cause_of, is_for_good, said
from actors.crew import Ledger, Replica, State
from actors.faithfulness import Comparison, judge
from actors.lease import Lease, Outcome
from actors.losses import Losses
from actors.metrics import CrewMetrics
from actors.patience import Patience
from actors.suspects import Inquest
from actors.teacher import CALLS_AT_A_TIME, Posting
from pipeline.cache.faithfulness import Verdict
from pipeline.cache.storage.layout import MANIFEST_JSON
from pipeline.cache.storage.store import Store
from pipeline.cache.unit_list import UnitList
from pipeline.errors import EngineDead, EngineError, StillhouseError
from pipeline.planning.resources import Placement, is_idle
from pipeline.run.progress import Progress

TICK_S = 0.5
CLOSING_S = 20.0
"""For engines of several ranks to close by themselves at the end of a whole capture. All others are killed at once:
their memory is that of the replica's own process."""


def supervise(crews: Sequence["Crew"]) -> None:
    """Work until every crew is finished or has failed. Raises the first failure, after the others are done."""
    try:
        while active := [crew for crew in crews if not crew.finished]:
            for crew in active:
                crew.tick()
            owners = {ref: crew for crew in active for ref in crew.refs()}
            if owners:
                ray.wait(list(owners), timeout=TICK_S)
                for ref in ray.wait(list(owners), num_returns=len(owners), timeout=0)[0]:
                    owners[ref].settle(ref)
            for crew in active:
                if crew.finished:
                    crew.dismiss()
    finally:
        for crew in crews:
            crew.dismiss()
    for crew in crews:
        if crew.failure is not None:
            raise crew.failure


class Crew:
    """One teacher's replicas, and what is left for them to do: the pending units, then the faithfulness check."""

    def __init__(
        self,
        posting: Posting,
        placement: Placement,
        backlog: Backlog,
        *,
        patience: Patience,
        losses: Losses,
        allowed_casualties: int,
        progress: Progress,
        casualties: int = 0,
    ) -> None:
        self.ledger = Ledger(casualties=casualties)
        self.failure: StillhouseError | None = None
        self.verdict: Verdict | None = None
        self.progress = progress
        self._posting = posting
        self._placement = placement
        self._store = Store.open(posting.cache_uri)
        self._backlog = backlog
        self._inquests: dict[str, Inquest] = {}
        self._suspects: deque[str] = deque()
        self._checks: deque[Lease] | None = None
        self._sample: list[str] = []
        self._comparisons: dict[str, Comparison] = {}
        self._replicas: list[Replica] = []
        self._patience = patience
        self._losses = losses
        self._allowed_casualties = allowed_casualties
        self._metrics = CrewMetrics(posting.teacher.name)

    @property
    def finished(self) -> bool:
        """Nothing is left to do, or nothing can be done."""
        return self.failure is not None or self.verdict is not None

    def refs(self) -> list[Any]:
        """Everything that a replica owes an answer to."""
        return [ref for replica in self._replicas for ref in replica.refs()]

    def tick(self) -> None:
        """Hire and retire, give out leases, and look for replicas that are silent."""
        try:
            self._prepare_checks()
            self._recruit()
            self._give_out()
            self._kill_the_hung()
            self._replace_the_lost()
        except StillhouseError as error:
            self.failure = error
        serving = sum(replica.state is State.SERVING for replica in self._replicas)
        self._metrics.record(len(self._backlog), serving, self.ledger.bytes_per_token())
        self.progress.beat("" if serving else self._waiting_for())

    def settle(self, ref: Any) -> None:
        """Take one answer, good or bad."""
        replica = next((replica for replica in self._replicas if ref in replica.refs()), None)
        if replica is None:
            return
        try:
            self._take(replica, ref)
        except StillhouseError as error:
            self.failure = self.failure or error  # replicas may fall together: the first says why

    def dismiss(self) -> None:
        """Let every replica go, and give back the memory and the places."""
        if self.verdict is not None and self._posting.teacher.ranks > 1:
            closing = [replica.actor.close.remote() for replica in self._replicas if replica.state is State.SERVING]
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=CLOSING_S)
        for replica in list(self._replicas):
            self._let_go(replica)
        self.progress.close()

    # What comes back

    def _take(self, replica: Replica, ref: Any) -> None:
        lease = replica.leases.pop(ref, None)
        arriving = replica.is_arriving(ref)
        try:
            answer = ray.get(ref)
        except EngineDead as error:
            self._down(replica, lease, said(error), announced=True)
        except StillhouseError as error:
            raise error.cause if isinstance(error, RayTaskError) else error from None
        except RayTaskError as error:
            name = self._posting.teacher.name
            raise EngineError(f"teacher {name}: {type(error.cause).__name__}: {error.cause}") from error
        except RayError as error:
            self._down(replica, lease, replica.silence or cause_of(error), gone=arriving or is_for_good(error))
        else:
            self._up(replica, lease, answer)

    def _up(self, replica: Replica, lease: Lease | None, answer: Any) -> None:
        replica.heard()
        if isinstance(answer, Outcome):
            self._patience.learn(answer)
        if lease is None:
            if replica.advance(answer):
                self._losses.opened()
                if sum(r.state is State.SERVING for r in self._replicas) == 1 and not self.ledger.units:
                    self.progress.restart_clock()
            return
        self._losses.worked()
        if lease.closing:
            self._check(answer)
            return
        if isinstance(answer, Comparison):
            self._comparisons[lease.unit_id] = answer
            self._judge()
            return
        inquest = self._inquests.get(lease.unit_id)
        if inquest is not None and not inquest.survived():
            self._suspects.appendleft(lease.unit_id)
            return
        self._inquests.pop(lease.unit_id, None)
        self._committed(answer)

    def _committed(self, outcome: Outcome) -> None:
        self.ledger.add(outcome)
        self.progress.advance(1, outcome.tokens)
        if self.ledger.casualties > self._allowed_casualties:
            raise EngineError(
                f"teacher {self._posting.teacher.name}: {self.ledger.casualties} rows quarantined, expected at most "
                f"{self._allowed_casualties} (capture.quarantine_cap); see {self._store.where('quarantine')}"
            )

    def _down(
        self, replica: Replica, lease: Lease | None, message: str, *, announced: bool = False, gone: bool = False
    ) -> None:
        """A replica is dead, or says that its engine is. One death, however many leases were with it."""
        displaced = self._losses.is_gone(replica.node)
        if not (replica.fallen or displaced) and (replica.state is not State.WAITING or gone):
            self._count_death(replica, message)
        innocent = replica.announced or displaced
        replica.fall(announced)
        if gone:
            self._let_go(replica)
        if lease is None:
            return
        self.ledger.retries += 1
        self._metrics.retry()
        if lease.check or lease.closing:
            self._checks = deque([*(self._checks or ()), lease])
        elif innocent:
            self._return(lease)
        else:
            self._suspect(lease, message, announced=announced)

    def _count_death(self, replica: Replica, message: str) -> None:
        if replica.state is State.SERVING:
            self._losses.died(replica.node, message)
        else:
            self._losses.did_not_open("" if replica.state is State.WAITING else replica.node, message)

    def _suspect(self, lease: Lease, message: str, *, announced: bool) -> None:
        if lease.unit_id in self._inquests:
            self._inquests[lease.unit_id].died(message)
        else:
            unit = UnitList.open(self._store).read(lease.unit_id)
            ids = [sequence.sequence_id for sequence in unit.sequences]
            self._inquests[lease.unit_id] = Inquest(lease.unit_id, ids, message if announced else None)
        self._suspects.append(lease.unit_id)

    def _return(self, lease: Lease) -> None:
        if lease.unit_id in self._inquests:
            self._suspects.append(lease.unit_id)
        else:
            self._backlog.give_back(lease.unit_id)

    # What goes out

    def _give_out(self) -> None:
        """Suspects go out alone, to the replica with the least to do; the other replicas stay busy meanwhile."""
        serving = [replica for replica in self._replicas if replica.state is State.SERVING]
        serving.sort(key=lambda replica: len(replica.leases))
        for replica in serving:
            if replica.alone:
                continue
            if self._suspects:
                if not replica.leases:
                    self._lend(replica, self._inquests[self._suspects.popleft()].lease(), alone=True)
                if len(serving) == 1 or replica is serving[0]:
                    continue
            if self._checks and not replica.leases:
                self._lend(replica, self._checks.popleft())
            while self._backlog and len(replica.leases) < CALLS_AT_A_TIME:
                self._lend(replica, Lease(self._backlog.take()))

    def _lend(self, replica: Replica, lease: Lease, *, alone: bool = False) -> None:
        replica.lend(getattr(replica.actor, _method_for(lease)).remote(lease), lease, alone=alone)

    def _prepare_checks(self) -> None:
        """Once every unit is committed: a replica writes the manifest, then a sample is scored again."""
        in_flight = any(replica.leases for replica in self._replicas)
        if self._checks is not None or self._backlog or self._suspects or in_flight:
            return
        self.ledger.serving_s += sum(replica.clock_out() for replica in self._replicas)
        self.progress.stop_clock()
        self._checks = deque([Lease(MANIFEST_JSON, closing=True)])

    def _check(self, leases: Sequence[Lease]) -> None:
        self._sample = [lease.unit_id for lease in leases]
        self._checks = deque(leases)
        self._judge()

    def _judge(self) -> None:
        if len(self._comparisons) == len(self._sample):
            self.verdict = judge(self._comparisons.values(), self._sample)

    # Who is there

    def _recruit(self) -> None:
        low, high = self._posting.teacher.replica_range
        leases = sum(len(replica.leases) for replica in self._replicas)
        work = len(self._backlog) + len(self._suspects) + len(self._checks or ()) + leases
        wanted = min(high, max(-(-work // CALLS_AT_A_TIME), min(low, work)))
        queued = any(replica.state is State.WAITING for replica in self._replicas)
        while len(self._replicas) < wanted and (len(self._replicas) < low or not queued):
            self._replicas.append(Replica.hire(self._posting, self._placement))
            queued = True
        for replica in [replica for replica in self._replicas if not replica.leases][: len(self._replicas) - wanted]:
            if len(self._replicas) > max(wanted, 1):
                self._let_go(replica)

    def _let_go(self, replica: Replica) -> None:
        if self._checks is None:
            self.ledger.serving_s += replica.clock_out()
        self._replicas.remove(replica)
        replica.leave()

    def _kill_the_hung(self) -> None:
        for replica in self._replicas:
            limit_s = self._patience.deadline_s() if replica.is_at_its_engine() else self._patience.opening_s
            if replica.owes_an_answer() and replica.silent_s() > limit_s:
                replica.kill(f"the engine did not answer for {limit_s:.0f} s")

    def _replace_the_lost(self) -> None:
        """A replica that gets no place in an idle cluster will not get one by waiting."""
        waiting = [replica for replica in self._replicas if replica.state is State.WAITING]
        if not waiting:
            return
        idle = is_idle(self._placement, ray.cluster_resources(), ray.available_resources())
        for replica in waiting:
            if replica.passed_over_s(cluster_idle=idle) > self._patience.arrival_s:
                reason = (
                    f"no place after {self._patience.arrival_s:.0f} s, though nothing else runs; see teachers.placement"
                )
                self._down(replica, None, reason, gone=True)

    def _waiting_for(self) -> str:
        if any(replica.is_opening() for replica in self._replicas):
            return "the engine is opening"
        asked = ", ".join(f"{amount:g} {name}" for name, amount in self._placement.total.items())
        return f"waiting for {asked}"


def _method_for(lease: Lease) -> str:
    if lease.closing:
        return "finish"
    return "check" if lease.check else "probe" if lease.rows else "capture"
