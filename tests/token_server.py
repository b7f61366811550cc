"""A cluster at the level of tokens and steps, small enough to run minutes of it: the product's counters, ledger and queues
under a server that admits optimistically, prefills in chunks, decodes in a batch and preempts when its pool is full.

It knows no blocks, copies or prefixes: a running request holds prompt + output tokens, a preempted one is computed anew. All
service that it gives is told to a `FairnessChecker`, whatever policy admits.
"""

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum

from cost_service.charges import Served, ServiceUnit
from cost_service.service_messages import UNTOLD, Answer, ReplicaLimits, Report
from global_scheduler.bound import FairnessBound, fairness_bound
from global_scheduler.counters import FairCounters
from global_scheduler.fair_share import FairShare
from global_scheduler.fairness_checker import FairnessChecker
from replicas.bypass import Bypass, Need, Room
from replicas.fair_queue import Admission, FairQueue, Waiting
from replicas.tenant_service import TenantService
from tests.token_requests import Request

STEP_S = 0.05
BATCH_TOKENS = 256
MAX_SEQS = 32
LOOK_AHEAD = 8


class Scheduling(Enum):
    """What decides who is admitted."""

    FIRST_COME = "first come"
    LOCAL = "counters of each replica alone"
    GLOBAL = "counters of the cluster"


class Engine:
    """One replica."""

    def __init__(self, name: str, cluster: "Cluster", life: int) -> None:
        self.name, self.cluster, self.epoch = name, cluster, f"{name}/{life}"
        self.service = TenantService()
        admission = Admission.FIRST_COME if cluster.scheduling is Scheduling.FIRST_COME else Admission.FAIR
        self.queue = FairQueue(self.service, admission)
        self.bypass = Bypass(cluster.bypass_tokens, cluster.bypass_service)
        self.running: list[Request] = []
        self.requests: dict[str, Request] = {}
        self.sequence, self.version = 0, UNTOLD
        self.heard_of = 0
        self.num_idle_offences = self.num_used = 0
        for tenant, weight in cluster.weights.items():
            self.service.set_weight(tenant, weight)

    def add(self, request: Request, *, front: bool = False) -> None:
        self.requests[request.name] = request
        self.queue.add(
            Waiting(
                request_id=request.name, account=self.service.account(request.tenant, request.user),
                arrival_s=request.arrival_s, service_s=STEP_S * (1 + request.num_output),
                held=self.predicted(request) + (0.0 if request.charged else float(request.num_prompt)),
            ),
            front=front,
        )  # fmt: skip
        self.cluster.note_waiting(request.tenant, 1)

    def step(self, now_s: float) -> None:
        self.queue.begin_step(now_s)
        batch = BATCH_TOKENS
        preempted = False
        for request in list(self.running):  # those that run grow first, as in vLLM
            if request not in self.running:
                continue
            chunk = min(request.num_wanted - request.num_computed, batch)
            while request in self.running and self.num_used + chunk > self.cluster.num_pool_tokens:
                self.preempt(now_s)
                preempted = True
            if request in self.running:
                request.num_computed += chunk
                self.num_used += chunk
                batch -= chunk
        if not preempted:
            self.admit(batch)
        self.deliver([each for each in self.running if each.num_computed == each.num_wanted], now_s)
        assert self.num_used == sum(each.num_computed for each in self.running) <= self.cluster.num_pool_tokens

    def predicted(self, request: Request) -> float:
        """Service of the output that is still to come, if outputs are predicted."""
        return 2.0 * (request.num_output - request.num_generated) if self.cluster.predicts else 0.0

    def need(self, waiting: Waiting) -> Need:
        request = self.requests[waiting.request_id]
        return Need(
            request_id=request.name, num_blocks=request.num_wanted, num_tokens=request.num_wanted,
            key=self.service.tenant_key(request.tenant), weight=self.cluster.weights.get(request.tenant, 1.0),
        )  # fmt: skip

    def admit(self, batch: int) -> None:
        room = Room(
            num_free_blocks=self.cluster.num_pool_tokens - self.num_used - self.num_promised, num_batch_tokens=batch,
            num_seqs=MAX_SEQS - len(self.running),
        )  # fmt: skip
        while len(self.queue) and room.num_seqs > 0 and room.num_batch_tokens > 0:
            needs = [self.need(each) for each in self.queue.first(LOOK_AHEAD)]
            plan = self.bypass.plan(needs, room)
            if not plan.first:
                break
            self.queue.let_ahead(plan.first[:1])
            waiting = self.queue.pop()
            self.bypass.admitted(plan, {waiting.request_id})
            assert waiting.request_id == plan.first[0]
            request = self.requests[waiting.request_id]
            self.cluster.note_waiting(request.tenant, -1)
            chunk = min(request.num_wanted, room.num_batch_tokens)
            if not request.charged:
                request.charged = True
                self.charge(request, Served(num_input_tokens=request.num_prompt))
            self.service.reserve(request.name, self.predicted(request))
            request.num_computed = chunk
            self.num_used += chunk
            self.running.append(request)
            room = Room(
                num_free_blocks=room.num_free_blocks - request.num_wanted,
                num_batch_tokens=room.num_batch_tokens - chunk, num_seqs=room.num_seqs - 1,
            )  # fmt: skip
        if len(self.queue) and self.bypass.left_idle([self.need(each) for each in self.queue.first(LOOK_AHEAD)], room):
            self.num_idle_offences += 1

    @property
    def num_promised(self) -> int:
        """Tokens of prompts that are admitted and not computed yet: vLLM has blocks only for chunks, and admits on them."""
        return sum(each.num_wanted - each.num_computed for each in self.running)

    def preempt(self, now_s: float) -> None:
        """Take the pool back from the last request of the most-served tenant; from the last that came, if first come."""
        if self.cluster.scheduling is Scheduling.FIRST_COME or not self.cluster.victims_most_served:
            victim = self.running[-1]
        else:
            victim = max(
                self.running, key=lambda each: (self.service.tenant_key(each.tenant), self.running.index(each))
            )
        self.service.charge_system(Served(num_input_tokens=victim.num_computed))
        self.running.remove(victim)
        self.num_used -= victim.num_computed
        victim.num_computed = 0
        self.cluster.num_preemptions += 1
        self.add(victim, front=True)

    def charge(self, request: Request, served: Served) -> None:
        self.service.charge("", self.service.account(request.tenant, request.user), served)
        self.cluster.serve(request.tenant, served)

    def deliver(self, requests: list[Request], now_s: float) -> None:
        """One output token for each, charged by account."""
        by_account = Counter((each.tenant, each.user) for each in requests)
        for (tenant, user), num in by_account.items():
            if not self.cluster.predicts:
                self.service.charge("", self.service.account(tenant, user), Served(num_output_tokens=num))
            self.cluster.serve(tenant, Served(num_output_tokens=num))
        for request in requests if self.cluster.predicts else ():  # what is held is used up request by request
            account = self.service.account(request.tenant, request.user)
            self.service.charge(request.name, account, Served(num_output_tokens=1))
        for request in requests:
            request.num_generated += 1
            if request.num_generated == request.num_output:
                request.finish_s = now_s + STEP_S
                self.running.remove(request)
                self.num_used -= request.num_computed
                self.service.release(request.name)
                del self.requests[request.name]
                self.cluster.finished.append(request)

    def report(self, *, everything: bool) -> Report:
        self.sequence += 1
        accounts = self.service.take_report(self.sequence, everything=everything)
        return Report(replica=self.name, epoch=self.epoch, sequence=self.sequence, accounts=accounts)

    def learn(self, answer: Answer, life: int) -> None:
        self.version, self.heard_of = answer.version, life
        for share in answer.shares:
            self.service.learn(share)


@dataclass
class Cluster:
    """Engines, the scheduler that they report to, and the checker that watches."""

    scheduling: Scheduling
    num_replicas: int = 1
    num_bound_replicas: int | None = None
    """Most replicas at any time, for the bound."""

    num_pool_tokens: int = 5_000
    sync_s: float = 0.1
    weights: dict[str, float] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    """Whom a tenant is compared with, if not with all."""

    place: Callable[["Cluster", Request], int] | None = None
    bypass_tokens: int = 1024
    bypass_service: float = 1024.0
    predicts: bool = False
    """Whether the output is charged in advance, at its true length."""

    loses: float = 0.0
    """Share of reports, and of answers, that are lost."""

    worst_case: bool = False
    """Whether the checker holds tenants to the worst case, refills included."""

    victims_most_served: bool = True
    max_prompt: int = 256
    now_s: float = 0.0
    scheduler_down: bool = False
    store_s: float | None = 1.0
    """Seconds between two stored states of the scheduler; None stores nothing."""

    def __post_init__(self) -> None:
        self.finished: list[Request] = []
        self.served: dict[str, float] = {}
        self.served_before: dict[str, float] = {}
        self.raw: dict[str, Served] = {}
        self.num_preemptions = self.life = self.lives = 0
        self.num_waiting: dict[str, int] = {}
        self.chance = random.Random(11)
        self.checker = self.new_checker()
        self.engines: dict[int, Engine] = {}
        self.share = self.new_share()
        self.stored: dict[str, object] | None = None
        self.next_store_s = 0.0
        self.in_flight: deque[tuple[float, Engine, int, Answer, int]] = deque()
        self.next_sync_s: dict[int, float] = {}
        for number in range(self.num_replicas):
            self.start(number)

    def new_checker(self) -> FairnessChecker:
        bound = self.bound(self.num_bound_replicas or self.num_replicas)
        if self.worst_case:
            bound = replace(bound, memory_service=bound.memory_service + bound.refill_service, refill_service=0.0)
        checker = FairnessChecker(bound)
        for tenant, weight in self.weights.items():
            checker.set_weight(tenant, weight)
        for tenant, group in self.groups.items():
            checker.set_group(tenant, group)
        return checker

    def bound(self, num_replicas: int) -> FairnessBound:
        limits = ReplicaLimits(
            num_pool_tokens=self.num_pool_tokens, max_num_seqs=MAX_SEQS, max_tokens=1024,
            max_service_per_s=(BATCH_TOKENS + 2 * MAX_SEQS) / STEP_S, max_decode_tokens_per_s=MAX_SEQS / STEP_S,
        )  # fmt: skip
        return fairness_bound(
            [limits] * num_replicas, max_input_tokens=self.max_prompt, interval_s=self.sync_s, round_trip_s=2 * STEP_S,
            num_granted_tokens=self.bypass_service / 2.0,
        )  # fmt: skip

    def new_share(self) -> FairShare:
        share = FairShare(FairCounters(credit=self.bound(self.num_replicas).unit))
        for tenant, weight in self.weights.items():
            share.set_weight(tenant, weight)
        for number in self.engines:
            share.add_replica(f"r{number}")
        return share

    def start(self, number: int) -> None:
        self.lives += 1
        self.engines[number] = Engine(f"r{number}", self, self.lives)
        self.share.add_replica(f"r{number}")
        self.next_sync_s[number] = self.now_s + self.sync_s * (1 + number) / (1 + self.num_replicas)

    def stop(self, number: int, *, announced: bool = True) -> None:
        """End a replica; its unfinished requests begin anew elsewhere, what they delivered stays delivered."""
        engine = self.engines.pop(number)
        if announced:
            self.share.remove_replica(engine.name)
        orphans = list(engine.requests.values())
        running = {each.name for each in engine.running}
        for request in orphans:
            if request.name not in running:
                self.note_waiting(request.tenant, -1)
            request.num_computed = 0
            self.submit(request)

    def kill_scheduler(self) -> None:
        self.scheduler_down = True

    def revive_scheduler(self) -> None:
        self.scheduler_down = False
        self.life += 1
        engines, self.engines = self.engines, {}
        self.share = self.new_share()
        self.engines = engines
        if self.stored is not None:
            self.share.restore(self.stored)
        for tenant, weight in self.weights.items():
            self.share.set_weight(tenant, weight)
        for number in self.engines:
            self.share.add_replica(f"r{number}")

    def note_waiting(self, tenant: str, by: int) -> None:
        self.num_waiting[tenant] = now = self.num_waiting.get(tenant, 0) + by
        self.checker.set_waiting(tenant, now > 0)

    def serve(self, tenant: str, served: Served) -> None:
        service = ServiceUnit().service(served)
        self.served[tenant] = self.served.get(tenant, 0.0) + service
        self.raw[tenant] = self.raw.get(tenant, Served()).plus(served)
        self.checker.serve(tenant, service)

    def submit(self, request: Request) -> None:
        """Place a request: by the experiment's rule, else where the tenant has least waiting and running."""
        if self.place is not None:
            number = self.place(self, request)
        else:
            number = min(
                self.engines,
                key=lambda each: (sum(r.tenant == request.tenant for r in self.engines[each].requests.values()), each),
            )
        request.replica = number
        self.engines[number].add(request)

    def run(
        self,
        requests: Iterable[Request],
        until_s: float,
        events: dict[float, Callable[["Cluster"], None]] | None = None,
    ) -> None:
        """Run to a time; events happen at theirs."""
        waiting = deque(sorted(requests, key=lambda each: each.arrival_s))
        todo = deque(sorted((events or {}).items()))
        while self.now_s < until_s:
            while todo and todo[0][0] <= self.now_s:
                todo.popleft()[1](self)
            while waiting and waiting[0].arrival_s <= self.now_s:
                self.submit(waiting.popleft())
            for engine in list(self.engines.values()):
                engine.step(self.now_s)
            if self.scheduling is Scheduling.GLOBAL:
                self.synchronise()
            self.now_s += STEP_S

    def synchronise(self) -> None:
        """Reports at each replica's interval; answers come a step later."""
        while self.in_flight and self.in_flight[0][0] <= self.now_s:
            _, engine, sequence, answer, life = self.in_flight.popleft()
            engine.service.answered(sequence)
            engine.learn(answer, life)
        for number, engine in self.engines.items():
            if self.now_s < self.next_sync_s[number]:
                continue
            self.next_sync_s[number] = self.now_s + self.sync_s
            if self.scheduler_down:
                continue
            first = engine.heard_of != self.life or engine.version == UNTOLD
            known = engine.service.known() if engine.heard_of != self.life else None
            report = engine.report(everything=first)
            if self.loses and self.chance.random() < self.loses:
                continue
            self.share.take(report, known=known)
            if self.loses and self.chance.random() < self.loses:
                continue
            answer = self.share.answer(
                engine.name, engine.epoch, since=UNTOLD if first else engine.version, named=report.accounts
            )
            self.in_flight.append((self.now_s + STEP_S, engine, report.sequence, answer, self.life))
        if self.store_s is not None and self.now_s >= self.next_store_s and not self.scheduler_down:
            self.next_store_s = self.now_s + self.store_s
            self.stored = self.share.state()

    def watch_from_here(self) -> None:
        """Let shares and the checker's gaps begin."""
        self.count_from_here()
        self.checker = self.new_checker()
        for tenant, num in self.num_waiting.items():
            self.checker.set_waiting(tenant, num > 0)

    def count_from_here(self) -> None:
        """Let shares begin."""
        self.served_before = dict(self.served)

    def shares(self) -> dict[str, float]:
        """Each tenant's part of the service since then."""
        since = {name: service - self.served_before.get(name, 0.0) for name, service in sorted(self.served.items())}
        return {name: service / sum(since.values()) for name, service in since.items()}

    def ratio(self, f: str, g: str) -> float:
        return self.shares()[f] / self.shares()[g]
