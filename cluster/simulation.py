"""A cluster of simulated engines in virtual time: arrivals, routing, crashes, reports, and checks of what must always hold.

Rules:
- One heap of events, ordered by time; what happens at one time is ordered by kind, then by its number. All chance comes from
  generators seeded with the run's seed, so that a run is the same anywhere.
- Requests are read one after another, and records handed on when requests are over: memory is bounded by what is under way.
- A crash loses a replica's KV and all its requests, and begins a new epoch. Requests are sent again from their beginning, or
  stay unfinished (`resubmit`).
- Reports of a replica are cumulative since its epoch began. They arrive late, or never.
"""

import heapq
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from cluster.records import RequestRecord
from cluster.routing import Router
from cluster.simulated_engine import SimulatedEngine
from cluster.simulated_request import SimulatedRequest, Status, prefix_parts
from cost_service.output_length import OutputLength
from cost_service.traces import TraceRequest
from replicas.request_stamp import OUTPUT_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbances:
    """What goes wrong, by chance."""

    seed: int = 0
    crash_interval_s: float = math.inf
    """Seconds that a replica runs until it crashes, in the mean."""

    restart_s: float = 60.0
    """Until it is back."""

    resubmit: bool = True
    """Whether what a crashed replica had is sent again; else it stays unfinished."""

    leave_share: float = 0.0
    """Share of requests whose client leaves after an exponential time, if it has no answer by then."""

    patience_s: float = 60.0
    """That time's mean."""

    report_delay_s: float = 0.0
    """Until a report arrives, in the mean; half of it is the same for all."""

    report_loss: float = 0.0
    """Share of reports that never arrive."""

    def __post_init__(self) -> None:
        for name in ("crash_interval_s", "restart_s", "patience_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0: it is {getattr(self, name)}.")
        for name in ("leave_share", "report_loss"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1: it is {getattr(self, name)}.")
        if not 0 <= self.report_delay_s < math.inf:
            raise ValueError(f"report_delay_s must be finite and not negative: it is {self.report_delay_s}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a replica has done for each tenant since its epoch began."""

    replica: int
    epoch: int
    sequence: int
    """Rises with every report of an epoch."""

    prompt_tokens: Mapping[str, int]
    output_tokens: Mapping[str, int]


class ReportReader(Protocol):
    """Whoever reads the replicas' reports: global fairness."""

    def read(self, report: Report, now_s: float) -> None:
        """A report has arrived; an older one of the same epoch may come after a newer one."""
        ...


class _Event(IntEnum):
    """Kinds of events, in the order in which they happen at one time."""

    RESTART = 0
    CRASH = 1
    LEAVE = 2
    REPORT_DUE = 3
    REPORT = 4
    STEP = 5


class Replica:
    """One place in the cluster, and the engine that runs there now."""

    def __init__(self, number: int, engine: SimulatedEngine) -> None:
        self.number, self.engine = number, engine
        self.epoch = self.sequence = 0
        self.up = True
        self.awaited_s = math.inf
        """Of the engine's next step, in the heap of events."""
        self.requests: dict[SimulatedRequest, None] = {}
        self.prompt_tokens: dict[str, int] = {}
        self.output_tokens: dict[str, int] = {}


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
        reader: ReportReader | None = None,
        report_interval_s: float = 0.1,
        lengths: OutputLength | None = None,
        check: bool = False,
    ) -> None:
        """Begin with idle replicas.

        Args:
            build: Makes the engine of a replica, at the start and after each crash.
            done: Called with the record of each request that is over.
            reader: None: no reports are made.
            lengths: What an ingress predicts and learns; None: engines know each request's length.
            check: Whether all that must hold is asserted after each event.
        """
        if num_replicas < 1:
            raise ValueError(f"num_replicas must be at least 1: it is {num_replicas}.")
        self.disturbances = disturbances or Disturbances()
        self.replicas = [Replica(number, build(number)) for number in range(num_replicas)]
        self.counts = Counts()
        self.now_s = 0.0
        self._build, self._router, self._done, self._reader, self._check = build, router, done, reader, check
        self._report_interval_s, self._lengths = report_interval_s, lengths
        self._chance = random.Random(self.disturbances.seed)
        self._events: list[tuple[float, int, int, Any]] = []
        self._num_events = 0
        self._homeless: list[SimulatedRequest] = []
        """Those who came while no replica was up."""
        for replica in self.replicas:
            router.up(replica.number, replica.engine, self.now_s)
            self._expect_crash(replica)
            if reader is not None:
                self._at(report_interval_s, _Event.REPORT_DUE, replica)

    def run(self, requests: Iterable[TraceRequest]) -> float:
        """Serve requests, which come in the order of arrival; return when the last one was over."""
        last_s = over_s = 0.0
        coming = iter(requests)
        following = next(coming, None)
        while following is not None or self._num_here:
            if following is not None and (not self._events or following.arrival_s <= self._events[0][0]):
                assert following.arrival_s >= last_s, "requests must come in the order of arrival"
                self.now_s = last_s = following.arrival_s
                self._arrive(following)
                following = next(coming, None)
            else:
                self.now_s, kind, _, subject = heapq.heappop(self._events)
                self._happen(_Event(kind), subject)
            if self._check:
                self.check()
            over_s = self.now_s
        return over_s

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
        most, stamp = one.output_tokens, None
        if self._lengths is not None:
            most = settings.max_model_len - one.prompt_tokens
            _, median, upper = self._lengths.predict(one.tenant, one.prompt_tokens, most)
            stamp = {OUTPUT_TOKENS: [round(median), round(upper)]}
        request = SimulatedRequest(
            str(self.counts.arrived), tenant=one.tenant, arrival_s=one.arrival_s, prompt_tokens=one.prompt_tokens,
            output_tokens=one.output_tokens, prefix=prefix, stamp=stamp, max_tokens=most,
        )  # fmt: skip
        self.counts.arrived += 1
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
            self._crash(subject)
        elif kind is _Event.RESTART:
            self._restart(subject)
        elif kind is _Event.REPORT_DUE:
            self._report(subject)
        else:
            assert self._reader is not None, "a report for nobody"
            self._reader.read(subject, self.now_s)

    def _step(self, replica: Replica) -> None:
        for request in replica.engine.run(self.now_s):
            del replica.requests[request]
            if request.status is Status.FINISHED:
                assert request.num_output == request.output_tokens, f"{request.request_id} has other tokens than asked"
                self.counts.finished += 1
                if self._lengths is not None:
                    self._lengths.observe(request.tenant, request.prompt_tokens, request.output_tokens)
            else:
                self.counts.left += 1
            self._end(replica, request)
        self._follow(replica)

    def _end(self, replica: Replica | None, request: SimulatedRequest) -> None:
        """A request is over."""
        self._router.ended(request)
        if replica is not None and self._reader is not None:
            _credit(replica, request)
        self._done(request.record())

    def _leave(self, request: SimulatedRequest) -> None:
        if request.status in (Status.FINISHED, Status.ABORTED):
            return
        if request.home is None:
            self._homeless.remove(request)
            request.status = Status.ABORTED
            self.counts.left += 1
            self._end(None, request)
            return
        replica = self.replicas[request.home]
        replica.engine.abort(request, self.now_s)
        self._follow(replica)

    def _crash(self, replica: Replica) -> None:
        """Lose an engine with all that it has; what it was computing is never delivered."""
        self.counts.crashes += 1
        replica.up = False
        self._router.down(replica.number)
        replica.engine.settle(self.now_s)
        lost, replica.requests = list(replica.requests), {}
        for request in lost:
            if request in replica.engine.leaving:
                request.status = Status.ABORTED
                self.counts.left += 1
                self._end(None, request)
            elif self.disturbances.resubmit:
                request.restart()
                self._send(request)
            else:
                request.status = Status.ABORTED
                self.counts.lost += 1
                self._end(None, request)
        self._at(self.now_s + self.disturbances.restart_s, _Event.RESTART, replica)

    def _restart(self, replica: Replica) -> None:
        replica.engine, replica.up = self._build(replica.number), True
        replica.epoch += 1
        replica.awaited_s = math.inf
        replica.sequence = 0
        replica.prompt_tokens, replica.output_tokens = {}, {}
        self._router.up(replica.number, replica.engine, self.now_s)
        self._expect_crash(replica)
        homeless, self._homeless = self._homeless, []
        for request in homeless:
            self._send(request)

    def _expect_crash(self, replica: Replica) -> None:
        if self.disturbances.crash_interval_s < math.inf:
            delay_s = self._chance.expovariate(1 / self.disturbances.crash_interval_s)
            self._at(self.now_s + delay_s, _Event.CRASH, replica)

    def _report(self, replica: Replica) -> None:
        """Send what a replica has done so far, unless it is down; late, or never."""
        self._at(self.now_s + self._report_interval_s, _Event.REPORT_DUE, replica)
        if not replica.up:
            return
        replica.engine.interrupt(self.now_s)
        self._follow(replica)
        replica.engine.settle(self.now_s)
        for request in replica.engine.running:
            _credit(replica, request)
        replica.sequence += 1
        report = Report(
            replica=replica.number, epoch=replica.epoch, sequence=replica.sequence,
            prompt_tokens=dict(replica.prompt_tokens), output_tokens=dict(replica.output_tokens),
        )  # fmt: skip
        if self._chance.random() >= self.disturbances.report_loss:
            half_s = self.disturbances.report_delay_s / 2
            delay_s = half_s + self._chance.expovariate(1 / half_s) if half_s else 0.0
            self._at(self.now_s + delay_s, _Event.REPORT, report)

    def _follow(self, replica: Replica) -> None:
        """Wait for the engine's next event."""
        engine = replica.engine
        self._router.changed(replica.number, self.now_s)
        if engine.next_s < math.inf and engine.next_s != replica.awaited_s:
            replica.awaited_s = engine.next_s
            self._at(engine.next_s, _Event.STEP, (replica, engine))

    def _at(self, at_s: float, kind: _Event, subject: Any) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (at_s, kind, self._num_events, subject))


def _credit(replica: Replica, request: SimulatedRequest) -> None:
    """Add what a request has got since the last time to its replica's totals."""
    if not request.num_output:
        return
    if not request.num_reported:
        replica.prompt_tokens[request.tenant] = replica.prompt_tokens.get(request.tenant, 0) + request.prompt_tokens
    new = request.num_output - request.num_reported
    replica.output_tokens[request.tenant] = replica.output_tokens.get(request.tenant, 0) + new
    request.num_reported = request.num_output
