"""The engine's decisions on admission in one place: whose turn it is, who may pass, and what tenants are charged.

Data flow: a request arrives -> `add` -> `select` says which queue the engine takes the next one from -> `admitted` charges
its prompt -> `delivered` charges its output -> `ended`; or it gives way, and `put_back` lets it wait again.

Rules:
- Two queues, as vLLM has them: `waiting`, and `skipped` for those that were passed over or hold blocks for a load. One order
  rules both. Those who hold blocks go first whatever the order: behind one that does not fit they would keep their blocks
  for ever while it waits for them (vLLM #57841).
- Prompts are charged when a request is first admitted, without what the prefix cache held; outputs as they are delivered.
  What is computed or copied again is the system's.
- Where outputs are predicted (`predicts_output`), what is left of a running request's prediction counts in advance and is
  used up by its output; what turns out too much is given back when it ends or gives way, and what is beyond is charged as
  it comes. It orders tenants and is never reported as service.
- Who passes a request that does not fit is planned when it is its turn, and again when all of the plan were tried, for
  behind them are others. Nobody passes a request without a stamp: those keep vLLM's order. Nothing is planned, in this or
  any later turn of the step, where nobody could be let in: no block is free, or the request has been passed enough.
- No clock and no engine: engine and simulator drive the same object.

Source: the order of charges is VTC's (arXiv:2401.00588, algorithm 2); vLLM 0.29 `v1/core/sched/scheduler.py` for the queues.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from cost_service.charges import ANONYMOUS, Account, Served, ServiceUnit
from cost_service.service_messages import AccountReport, Share
from cost_service.snapshot import CostSnapshot
from replicas.bypass import Bypass, Need, Plan, Room
from replicas.fair_queue import Admission, FairQueue, Waiting, first_of, next_of
from replicas.preemption import Action, PreemptionDecision
from replicas.preemption_cost import prefill_s
from replicas.tenant_service import TenantService


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionSettings:
    """What limits those who pass others, and how services are counted."""

    look_ahead: int = 8
    """Waiting requests that a step considers behind one that does not fit."""

    bypass_tokens: int = 4096
    """Prompt tokens that may be admitted ahead of a request that does not fit, in all its time."""

    bypass_service: float = 4096.0
    """Service at weight 1 by which a tenant may be ahead and still pass; the stated bound grows by it."""

    unit: ServiceUnit = field(default_factory=ServiceUnit)

    predicts_output: bool = False
    """Whether the predicted output of a running request counts in advance."""


NOBODY = Plan(admits=[], reason="nobody could be let in")


@dataclass(slots=True)
class _Request:
    """A request from its arrival to its end."""

    waiting: Waiting
    num_predicted_tokens: int = 0
    """Output that counts in advance; 0 where it does not."""

    num_output_tokens: int = 0
    """Charged so far."""

    was_admitted: bool = False


class RequestAdmission:
    """Who is admitted next in one engine, and what everybody was served there."""

    def __init__(self, admission: Admission = Admission.FAIR, settings: AdmissionSettings | None = None) -> None:
        self.settings = settings or AdmissionSettings()
        self.service = TenantService(self.settings.unit)
        self.waiting, self.skipped = FairQueue(self.service, admission), FairQueue(self.service, admission)
        self.bypass = Bypass(self.settings.bypass_tokens, self.settings.bypass_service)
        self._requests: dict[str, _Request] = {}
        self._plan: Plan | None = None
        self.selected: FairQueue | None = None
        """What `select` has returned last."""
        self.sequence = 0
        """Of the last service report."""

        self._token_us = 0.0  # engine time of an output token, as of late

    @property
    def admission(self) -> Admission:
        """The order in force."""
        return self.waiting.admission

    @property
    def is_fair(self) -> bool:
        """Whether tenants are told apart."""
        return self.admission is Admission.FAIR

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._requests

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self.waiting) + len(self.skipped)

    def follow(self, admission: Admission) -> None:
        """Order by another rule from now on; services are counted under either."""
        for queue in (self.waiting, self.skipped):
            queue.follow(admission)
        self._plan = None

    def add(
        self, request_id: str, *, tenant: str, user: str = "", weight: float | None = None, arrival_s: float,
        service_s: float, num_prompt_tokens: int, prompt_s: float = 0.0, num_output_tokens: int = 0,
        queue: FairQueue | None = None,
    ) -> None:  # fmt: skip
        """Let a request wait that has just arrived.

        Args:
            weight: Of its tenant, as whoever knows tenants says; None: as it is.
            arrival_s: In the engine's time; it may be before its start.
            service_s: Predicted seconds of its service alone.
            prompt_s: Those of its prompt.
            num_output_tokens: Predicted, and no more than it may generate.
            queue: Where, if not in `waiting`.
        """
        assert request_id not in self._requests, f"{request_id} has arrived twice"
        account = self.service.account(tenant, user)
        if weight is not None and weight != self.service.weight(tenant):
            self.service.set_weight(tenant, weight)
        prompt = Served(num_input_tokens=num_prompt_tokens, engine_us=max(0, round(prompt_s * 1e6)))
        num_predicted = num_output_tokens if self.settings.predicts_output else 0
        held = self.settings.unit.service(prompt) + self._output_service(num_predicted)
        waiting = Waiting(
            request_id=request_id, account=account, arrival_s=arrival_s, service_s=service_s, prompt_s=prompt_s,
            held=held, num_tokens=num_prompt_tokens,
        )  # fmt: skip
        self._requests[request_id] = _Request(waiting, num_predicted)
        (self.waiting if queue is None else queue).add(waiting)

    def put_back(self, request_id: str, queue: FairQueue, *, front: bool = False) -> None:
        """Let a request wait again: it was passed over, loads its blocks, or has given way."""
        one = self._requests[request_id]
        if one.was_admitted:
            one.waiting = replace(one.waiting, held=self._left_service(one))
        queue.add(one.waiting, front=front)

    def begin_step(self, now_s: float, holders: Iterable[str] = ()) -> None:
        """Begin a step.

        Args:
            holders: Waiting requests that hold blocks; they go first, in this order.
        """
        for queue in (self.waiting, self.skipped):
            queue.begin_step(now_s)
        self.skipped.let_ahead(holders)
        self._plan = None

    def select(
        self, room: Callable[[], Room], need: Callable[[str], Need], has_blocks: Callable[[str], bool]
    ) -> FairQueue | None:
        """Return the queue whose head is to be tried next; None when nobody waits.

        Args:
            room: What the engine has left at this moment.
            need: What a waiting request takes, in the same units; blocks of 0 for one that the engine must look at first.
            has_blocks: Whether a request that was taken out of a queue in this step got blocks.
        """
        self.selected = queue = first_of(self.skipped, self.waiting)
        if queue is None or not self.is_fair:
            return queue
        head, plan = queue.peek(), self._plan
        if head.account.tenant == ANONYMOUS or (plan is not None and (head.request_id in plan.first or not plan.first)):
            return queue
        if plan is not None:
            self._count(plan, has_blocks)
        left = room()
        is_full = left.num_free_blocks <= 0
        if not is_full and left.fits(need(head.request_id)):
            return queue
        if is_full or self.bypass.is_spent(head.request_id):
            self._plan = NOBODY
            return queue
        self._plan = self.bypass.plan([need(each.request_id) for each in self.order()], left)
        for each in (self.waiting, self.skipped):
            each.let_ahead(self._plan.first)
        self.selected = first_of(self.skipped, self.waiting)
        return self.selected

    def order(self) -> list[Waiting]:
        """Those who would be admitted next, as far as a step looks ahead."""
        return next_of(self.skipped, self.waiting, self.settings.look_ahead)

    def end_step(self, has_blocks: Callable[[str], bool]) -> None:
        """End a step; `has_blocks` as for `select`."""
        if self._plan is not None:
            self._count(self._plan, has_blocks)

    def _count(self, plan: Plan, has_blocks: Callable[[str], bool]) -> None:
        """Count whom those of a plan have passed who got blocks."""
        self.bypass.admitted(plan, [each for each in plan.first if has_blocks(each)])
        self._plan = None

    def admitted(
        self, request_id: str, *, num_computed_tokens: int, num_cached_tokens: int, engine_us: int = 0
    ) -> None:
        """Charge what a request was admitted with.

        Args:
            num_computed_tokens: Tokens that it computes before its next output.
            num_cached_tokens: Those that were there already, in the prefix cache or in host memory.
            engine_us: Predicted microseconds of engine time of the former.
        """
        one = self._requests[request_id]
        self.bypass.forget((request_id,))
        if one.was_admitted:
            self.service.charge_system(Served(num_input_tokens=num_computed_tokens, engine_us=engine_us))
            return
        served = Served(num_computed_tokens, num_cached_tokens, 0, engine_us)
        self.service.charge(request_id, one.waiting.account, served)
        self.service.reserve(request_id, self._left_service(one))
        one.was_admitted = True

    def delivered(self, request_id: str, num_output_tokens: int, *, token_us: float = 0.0) -> None:
        """Charge output up to a total.

        Args:
            num_output_tokens: All that the request has had so far.
            token_us: Predicted microseconds of engine time of a token.
        """
        one = self._requests[request_id]
        num = num_output_tokens - one.num_output_tokens
        if num > 0:
            one.num_output_tokens = num_output_tokens
            served = Served(num_output_tokens=num, engine_us=round(num * token_us))
            self._token_us = token_us
            self.service.charge(request_id if one.num_predicted_tokens else "", one.waiting.account, served)

    def delivered_to(self, totals: Iterable[tuple[str, int]], *, token_us: float = 0.0) -> None:
        """As `delivered`, of many requests: with one charge for each account, where nothing is held for requests.

        Args:
            totals: Ids of requests with all output that each has had so far.
        """
        requests, given = self._requests, dict[Account, int]()
        for request_id, num_output_tokens in totals:
            one = requests[request_id]
            if one.num_predicted_tokens:
                self.delivered(request_id, num_output_tokens, token_us=token_us)
            elif (num := num_output_tokens - one.num_output_tokens) > 0:
                one.num_output_tokens = num_output_tokens
                account = one.waiting.account
                given[account] = given.get(account, 0) + num
        if given:
            self._token_us = token_us
        for account, num in given.items():
            self.service.charge("", account, Served(num_output_tokens=num, engine_us=round(num * token_us)))

    def _left_service(self, one: _Request) -> float:
        """Service of the predicted output that a request has not had."""
        return self._output_service(max(0, one.num_predicted_tokens - one.num_output_tokens))

    def _output_service(self, num_tokens: int) -> float:
        served = Served(num_output_tokens=num_tokens, engine_us=round(num_tokens * self._token_us))
        return self.settings.unit.service(served)

    def gave_way(self, decision: PreemptionDecision) -> None:
        """Charge what a swap is predicted to cost; what is computed again is charged when it is."""
        if decision.action is Action.SWAP:
            self.service.charge_system(Served(engine_us=round(decision.prices.swap_s * 1e6)))

    def ended(self, request_id: str) -> None:
        """Forget a request that has finished, or was aborted; it waits no more."""
        if self._requests.pop(request_id, None) is not None:
            self.service.release(request_id)
            self.bypass.forget((request_id,))

    def arrival_s(self, request_id: str) -> float:
        """When a request arrived, in the engine's time."""
        return self._requests[request_id].waiting.arrival_s

    def service_of(self, request_id: str) -> float:
        """Normalised service of a request's tenant, for the choice of victims; 0 where tenants are not told apart."""
        one = self._requests.get(request_id)
        return self.service.tenant_key(one.waiting.account.tenant) if one is not None and self.is_fair else 0.0

    def learn(self, shares: Iterable[Share], *, answered: int) -> None:
        """Take the cluster's word of tenants, and which report it has had."""
        self.service.learn(*shares)
        self.service.answered(answered)

    def waiting_tokens(self) -> dict[str, int]:
        """Tokens of the prompts of those who wait, by tenant."""
        tokens = dict(self.waiting.waiting_tokens)
        for tenant, num in self.skipped.waiting_tokens.items():
            tokens[tenant] = tokens.get(tenant, 0) + num
        return tokens

    def queued_s(self, num_at_once: int) -> float:
        """Predicted seconds until those who wait have been served, if nobody else came.

        Args:
            num_at_once: Requests that decode together, and share a step's time; prompts are computed one after another.
        """
        prompt_us, output_us = map(sum, zip(self.waiting.queued_us, self.skipped.queued_us, strict=True))
        return (prompt_us + output_us / max(1, num_at_once)) / 1e6

    def take_report(self, *, everything: bool = False) -> Mapping[Account, AccountReport]:
        """Return the lines of the next report, whose number is `sequence` then."""
        self.sequence += 1
        return self.service.take_report(self.sequence, everything=everything)

    def check(self) -> None:
        """Assert what always holds; O(n)."""
        self.service.check()
        for queue in (self.waiting, self.skipped):
            queue.check()
            assert all(each.request_id in self._requests for each in queue), "a stranger waits"
        both = {each.request_id for each in self.waiting} & {each.request_id for each in self.skipped}
        assert not both, f"{both} wait twice"


def service_alone_s(num_prompt_tokens: int, num_output_tokens: int, *, costs: CostSnapshot, step_s: float) -> float:
    """Predicted seconds of a request's service alone, as response ratios count it.

    Args:
        num_output_tokens: Predicted.
        step_s: Seconds of a step as of late.
    """
    return prefill_s([(0, num_prompt_tokens)], num_decodes=0, costs=costs) + num_output_tokens * step_s
