"""A cluster of simulated engines in virtual time: arrivals, routing, crashes, reports, and checks of what must always hold.

Rules:
- One heap of events, ordered by time; what happens at one time is ordered by kind, then by its number. All chance comes from
  generators seeded with the run's seed, so that a run is the same anywhere.
- Requests are read one after another, and records handed on when requests are over: memory is bounded by what is under way.
- A crash loses a replica's KV and all its requests, and begins a new epoch. Requests are sent again from their beginning, or
  stay unfinished (`resubmit`).
- Replicas exchange reports with a scheduler (`Exchange`), at an interval each. Messages arrive late, or never.
- A replica that is scaled away gets no new requests and is gone when it has served what it has. One that an autoscaler wants
  takes requests when it has started.
"""

import heapq
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from cluster.disturbances import Disturbances
from cluster.fairness_watch import FairnessWatch
from cluster.records import RequestRecord
from cluster.routing import Router
from cluster.simulated_autoscaling import SimulatedAutoscaler
from cluster.simulated_engine import SimulatedEngine
from cluster.simulated_exchange import Exchange
from cluster.simulated_replica import Replica
from cluster.simulated_request import SimulatedRequest, Status, prefix_parts
from cost_service.output_length import OutputLength
from cost_service.traces import TraceRequest
from replicas.request_stamp import OUTPUT_TOKENS, USER


class _Event(IntEnum):
    """Kinds of events, in the order in which they happen at one time."""

    RESTART = 0
    CRASH = 1
    LEAVE = 2
    REPORT_DUE = 3
    REPORT = 4
    STEP = 5
    ANSWER = 6
    SCALE = 7
    LOOK = 8


@dataclass(slots=True)
class Counts:
    """Requests by what became of them."""

    arrived: int = 0
    finished: int = 0
    left: int = 0
    lost: int = 0
    crashes: int = 0


class Simulation:
    """One run."""

    def __init__(
        self,
        build: Callable[[int], SimulatedEngine],
        *,
        num_replicas: int,
        router: Router,
        done: Callable[[RequestRecord], None],
        disturbances: Disturbances | None = None,
        exchange: Exchange | None = None,
        report_interval_s: float = 0.1,
        lengths: OutputLength | None = None,
        watch: FairnessWatch | None = None,
        num_users: Mapping[str, int] | None = None,
        scaler: SimulatedAutoscaler | None = None,
        check: bool = False,
    ) -> None:
        """Begin with idle replicas.

        Args:
            build: Makes the engine of a replica, at the start and after each crash.
            done: Called with the record of each request that is over.
            exchange: None: no reports are made.
            lengths: What an ingress predicts and learns; None: engines know each request's length.
            watch: Sees all service and who waits; engines must take no strides then.
            num_users: Of tenants whose requests come from several users, in turns.
            scaler: Says how many replicas there are to be; None: as many as there are, or as is given.
            check: Whether all that must hold is asserted after each event.
        """
        if num_replicas < 1:
            raise ValueError(f"num_replicas must be at least 1: it is {num_replicas}.")
        self.disturbances = disturbances or Disturbances()
        self.replicas = [Replica(number, build(number)) for number in range(num_replicas)]
        self.counts = Counts()
        self.now_s = 0.0
        self._build, self._router, self._done, self._exchange, self._check = build, router, done, exchange, check
        self._report_interval_s, self._lengths = report_interval_s, lengths
        self._watch, self._num_users = watch, num_users or {}
        self._chance = random.Random(self.disturbances.seed)
        self._events: list[tuple[float, _Event, int, Any]] = []
        self._num_events = 0
        self._homeless: list[SimulatedRequest] = []
        """Those who came while no replica was up."""
        for replica in self.replicas:
            self._begin(replica)
        for at_s, number in self.disturbances.crashes:
            self._at(at_s, _Event.CRASH, (number, None))
        for at_s, num in self.disturbances.scale:
            self._at(at_s, _Event.SCALE, num)
        if scaler is not None:
            self._at(0.0, _Event.LOOK, scaler)

    def _begin(self, replica: Replica, startup_s: float = 0.0) -> None:
        """Let a new replica take part, as soon as it has started."""
        if startup_s:
            replica.up = False
            self._at(self.now_s + startup_s, _Event.RESTART, replica)
        else:
            self._come_up(replica)
        if self._exchange is not None:
            self._at(self.now_s + self._report_interval_s, _Event.REPORT_DUE, replica)

    def _come_up(self, replica: Replica) -> None:
        self._router.up(replica.number, replica.engine, self.now_s)
        self._expect_crash(replica)
        if self._exchange is not None:
            self._exchange.up(replica)

    def run(self, requests: Iterable[TraceRequest], *, until_s: float = math.inf) -> float:
        """Serve requests, which come in the order of arrival; return when the last one was over.

        Args:
            until_s: When to stop; what is unfinished then is handed on as it is.
        """
        last_s = over_s = 0.0
        coming = iter(requests)
        following = next(coming, None)
        while following is not None or self._num_here:
            event_s = self._events[0][0] if self._events else math.inf
            arrival_s = following.arrival_s if following is not None else math.inf
            if min(event_s, arrival_s) > until_s:
                return self._stop(until_s)
            if following is not None and arrival_s <= event_s:
                assert arrival_s >= last_s, "requests must come in the order of arrival"
                self.now_s = last_s = arrival_s
                self._arrive(following)
                following = next(coming, None)
            else:
                self.now_s, kind, _, subject = heapq.heappop(self._events)
                self._happen(kind, subject)
            if self._check:
                self.check()
            over_s = self.now_s
        return over_s

    def _stop(self, now_s: float) -> float:
        """Hand on what is unfinished."""
        self.now_s = now_s
        for replica in self.replicas:
            if replica.up:
                replica.engine.settle(now_s)
        under_way = [request for replica in self.replicas for request in replica.requests]
        for request in [*under_way, *self._homeless]:
            self._done(request.record())
        return now_s

    @property
    def _num_here(self) -> int:
        counts = self.counts
        return counts.arrived - counts.finished - counts.left - counts.lost

    def check(self) -> None:
        """Assert that every request is in one place, and every block, slot and token accounted for."""
        where: set[SimulatedRequest] = set(self._homeless)
        num = len(self._homeless)
        for replica in self.replicas:
            if replica.up:
                replica.engine.check()
            num += len(replica.requests)
            where.update(replica.requests)
            assert replica.up or not replica.requests, f"replica {replica.number} is down and has requests"
            assert replica.engine.num_requests == len(replica.requests) or not replica.up, (
                f"replica {replica.number} has {replica.engine.num_requests} requests, not {len(replica.requests)}"
            )
        assert num == len(where) == self._num_here, f"{num} requests in {len(where)} places, {self._num_here} under way"

    def _arrive(self, one: TraceRequest) -> None:
        settings = self.replicas[0].engine.settings
        prefix = prefix_parts(one, block_size=settings.block_size)
        most, stamp = one.output_tokens, dict[str, Any]()
        if self._lengths is not None:
            most = settings.max_model_len - one.prompt_tokens
            _, median, upper = self._lengths.predict(one.tenant, one.prompt_tokens, most)
            stamp = {OUTPUT_TOKENS: [round(median), round(upper)]}
        if (num_users := self._num_users.get(one.tenant, 1)) > 1:
            stamp[USER] = str(self.counts.arrived % num_users)
        request = SimulatedRequest(
            str(self.counts.arrived), tenant=one.tenant, arrival_s=one.arrival_s, prompt_tokens=one.prompt_tokens,
            output_tokens=one.output_tokens, prefix=prefix, stamp=stamp, max_tokens=most,
        )  # fmt: skip
        self.counts.arrived += 1
        if self._watch is not None:
            self._watch.arrived(request.tenant)
        if self.disturbances.leave_share and self._chance.random() < self.disturbances.leave_share:
            self._at(self.now_s + self._chance.expovariate(1 / self.disturbances.patience_s), _Event.LEAVE, request)
        self._send(request)

    def _send(self, request: SimulatedRequest) -> None:
        """Give a request to a replica, or let it wait for one."""
        request.home = self._router.choose(request, self.now_s)
        if request.home is None:
            self._homeless.append(request)
            return
        replica = self.replicas[request.home]
        replica.requests[request] = None
        replica.engine.add(request, self.now_s)
        self._follow(replica)

    def _happen(self, kind: _Event, subject: Any) -> None:
        if kind is _Event.STEP:
            replica, engine = subject
            if replica.up and replica.engine is engine and engine.next_s == self.now_s:
                self._step(replica)
        elif kind is _Event.LEAVE:
            self._leave(subject)
        elif kind is _Event.CRASH:
            number, of_engine = subject
            replica = self.replicas[number]
            if replica.up and of_engine in (None, replica.engine):
                self._crash(replica)
        elif kind is _Event.RESTART:
            self._restart(subject)
        elif kind is _Event.REPORT_DUE:
            self._report(subject)
        elif kind is _Event.SCALE:
            self._scale(subject)
        elif kind is _Event.LOOK:
            self._look(subject)
        else:
            self._deliver(kind, *subject)

    def _step(self, replica: Replica) -> None:
        over = replica.engine.run(self.now_s)
        if self._watch is not None:
            replica.engine.running.settle()
            self._watch.stepped(replica.number, replica.engine.running, over, self.now_s)
        for request in over:
            del replica.requests[request]
            if request.status is Status.FINISHED:
                assert request.num_output == request.output_tokens, f"{request.request_id} has other tokens than asked"
                self.counts.finished += 1
                if self._lengths is not None:
                    self._lengths.observe(request.tenant, request.prompt_tokens, request.output_tokens)
            else:
                self.counts.left += 1
            self._router.ended(request)
            self._done(request.record())
        self._follow(replica)
        self._retire_if_idle(replica)

    def _end(self, request: SimulatedRequest) -> None:
        """A request is over that no engine has any more."""
        request.status = Status.ABORTED
        if self._watch is not None:
            self._watch.gone(request)
        self._done(request.record())

    def _leave(self, request: SimulatedRequest) -> None:
        if request.status in (Status.FINISHED, Status.ABORTED):
            return
        if request.home is None:
            self._homeless.remove(request)
            self.counts.left += 1
            self._end(request)
            return
        replica = self.replicas[request.home]
        replica.engine.abort(request, self.now_s)
        self._follow(replica)

    def _crash(self, replica: Replica) -> None:
        """Lose an engine with all that it has; what it was computing is never delivered."""
        self.counts.crashes += 1
        replica.up = False
        if not replica.draining:
            self._router.down(replica.number)
        if self._exchange is not None:
            self._exchange.down(replica)
        replica.engine.settle(self.now_s)
        lost, replica.requests = list(replica.requests), {}
        if self._watch is not None:
            self._watch.crashed(replica.number, lost)
        for request in lost:
            if request in replica.engine.leaving:
                self.counts.left += 1
                self._end(request)
            elif self.disturbances.resubmit:
                request.restart()
                self._send(request)
            else:
                self.counts.lost += 1
                self._end(request)
        if not replica.draining:
            self._at(self.now_s + self.disturbances.restart_s, _Event.RESTART, replica)

    def _restart(self, replica: Replica) -> None:
        if replica.up or replica.draining:  # scaled meanwhile
            return
        replica.engine, replica.up = self._build(replica.number), True
        replica.epoch += 1
        replica.awaited_s = math.inf
        self._come_up(replica)
        homeless, self._homeless = self._homeless, []
        for request in homeless:
            self._send(request)

    def _expect_crash(self, replica: Replica) -> None:
        if self.disturbances.crash_interval_s < math.inf:
            delay_s = self._chance.expovariate(1 / self.disturbances.crash_interval_s)
            self._at(self.now_s + delay_s, _Event.CRASH, (replica.number, replica.engine))

    def _report(self, replica: Replica) -> None:
        """Send what a replica has done so far, unless it is down; late, or never."""
        self._at(self.now_s + self._report_interval_s, _Event.REPORT_DUE, replica)
        if not replica.up:
            return
        replica.engine.interrupt(self.now_s)
        self._follow(replica)
        replica.engine.settle(self.now_s)
        assert self._exchange is not None, "a report for nobody"
        self._post(_Event.REPORT, (replica, replica.engine, self._exchange.report(replica, self.now_s)))

    def _post(self, kind: _Event, subject: Any) -> None:
        """Let a report or an answer arrive; late, or never."""
        if self._chance.random() >= self.disturbances.report_loss:
            half_s = self.disturbances.report_delay_s / 2
            delay_s = half_s + self._chance.expovariate(1 / half_s) if half_s else 0.0
            self._at(self.now_s + delay_s, kind, subject)

    def _deliver(self, kind: _Event, replica: Replica, engine: SimulatedEngine, message: Any) -> None:
        """A report has arrived, or an answer; whoever has crashed hears no answer."""
        assert self._exchange is not None, "a message for nobody"
        if kind is _Event.REPORT:
            answer = self._exchange.read(message, self.now_s)
            if answer is not None:
                self._post(_Event.ANSWER, (replica, engine, answer))
        elif replica.up and replica.engine is engine:
            self._exchange.learn(replica, message)

    def _look(self, scaler: SimulatedAutoscaler) -> None:
        """Let the autoscaler decide, and again after its interval."""
        self._scale(scaler.decide(self.replicas, self.now_s), scaler.startup_s)
        scaler.note(self.replicas, self.now_s)
        self._at(self.now_s + scaler.interval_s, _Event.LOOK, scaler)

    def _scale(self, num: int, startup_s: float = 0.0) -> None:
        """Have so many replicas: those with the highest numbers come and go."""
        for number in range(len(self.replicas), num):
            replica = Replica(number, self._build(number))
            self.replicas.append(replica)
            self._begin(replica, startup_s)
        for replica in self.replicas:
            was_draining, replica.draining = replica.draining, replica.number >= num
            if replica.draining and not was_draining and replica.up:
                self._router.down(replica.number)
                self._retire_if_idle(replica)
            elif was_draining and not replica.draining:
                if replica.up:
                    self._router.up(replica.number, replica.engine, self.now_s)
                elif startup_s:
                    self._at(self.now_s + startup_s, _Event.RESTART, replica)
                else:
                    self._restart(replica)

    def _retire_if_idle(self, replica: Replica) -> None:
        """A replica that is scaled away is gone when it has served all."""
        if replica.draining and replica.up and not replica.requests:
            replica.up = False
            if self._exchange is not None:
                self._exchange.down(replica)

    def _follow(self, replica: Replica) -> None:
        """Wait for the engine's next event."""
        engine = replica.engine
        if not replica.draining:
            self._router.changed(replica.number, self.now_s)
        if engine.next_s < math.inf and engine.next_s != replica.awaited_s:
            replica.awaited_s = engine.next_s
            self._at(engine.next_s, _Event.STEP, (replica, engine))

    def _at(self, at_s: float, kind: _Event, subject: Any) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (at_s, kind, self._num_events, subject))
