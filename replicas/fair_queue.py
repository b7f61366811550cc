"""The order of waiting requests inside one engine: least-served tenant, then its least-served user, then response ratio.

Rules:
- Tenants and users are ordered by `TenantService`, live: whoever is admitted is charged in advance, so that one tenant does
  not fill a step's batch.
- Within a user, the highest response ratio (wait + s) / s goes first (HRRN), s being the predicted service time. Ratios
  cross as time passes, so no heap can hold them. Requests are kept in classes of s that are a factor of 2 wide, first come
  first in a class, and the heads of the classes are compared by their own ratios.
  Error: the wait in units of service of the request that is chosen is at least half of the largest, wait / s > max / 2: the
  head of a class has waited longest in it, and no s of the class is below half of the head's.
- A choice stands until it is popped, removed, or a new step begins: `peek` equals the next `pop`, whatever arrives or is
  charged in between. Time stands still within a step.
- Requests without a stamp share the anonymous tenant, whose order is vLLM's own: first come, and what is prepended first.
  With the order `FIRST_COME` that holds for all requests.
- A preempted request comes back with its original arrival and goes through the fair order like any other.
- Who is let ahead (`replicas/bypass.py`: a head does not fit, others do) goes first for the rest of the step.

With n waiting requests, every operation costs O(log n), and the choice O(classes) of one user on top.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from cost_service.charges import ANONYMOUS, Account
from cost_service.lowest import SPARE_ENTRIES, Lowest
from replicas.tenant_service import TenantService

CLASS_FACTOR = 2.0
"""Width of a class of predicted service times; also the worst error, see above."""

MIN_SERVICE_S = 1e-3
"""Shorter predictions count as this: no request is served in less than a step."""


class Admission(StrEnum):
    """Which waiting request is admitted next."""

    FIRST_COME = "first-come"
    FAIR = "fair"


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A request that waits."""

    request_id: str
    account: Account
    """As `TenantService.account` returns it."""

    arrival_s: float = 0.0
    """In the engine's time; a preempted request keeps it."""

    service_s: float = MIN_SERVICE_S
    """Predicted seconds of service time alone."""

    prompt_s: float = 0.0
    """Those of them in which its prompt is computed."""

    held: float = 0.0
    """Service that is charged in advance when it is admitted: its prompt, and its output if that is predicted."""

    num_tokens: int = 0
    """Of its prompt, which routers are told that it wants room for."""

    def __post_init__(self) -> None:
        for name in ("arrival_s", "service_s", "prompt_s", "held"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} of {self.request_id} is {getattr(self, name)}; it must be a finite number.")

    @property
    def s(self) -> float:
        """Predicted service time, not too small to divide by."""
        return max(MIN_SERVICE_S, self.service_s)

    @property
    def queued_us(self) -> tuple[int, int]:
        """Predicted microseconds of its prompt, and of its output alone."""
        prompt_us = max(0, round(self.prompt_s * 1e6))
        return prompt_us, max(0, round(self.service_s * 1e6) - prompt_us)

    def ratio(self, now_s: float) -> float:
        """Response ratio if it were admitted now."""
        return (max(0.0, now_s - self.arrival_s) + self.s) / self.s


Rank = tuple[float, str, float, str, float, float, int]
"""Tenant's key and name, user's key and name, minus the response ratio, arrival, position: the lowest goes first."""

Place = tuple[float, int, str]
"""Arrival, position and id: the order within a class."""


@dataclass(slots=True)
class _Class:
    """Waiting requests of similar predicted service time, first come first; who is gone is thrown out at the top."""

    heap: list[Place] = field(default_factory=list)
    num_gone: int = 0


@dataclass(slots=True)
class _Tenant:
    users: Lowest
    classes: dict[str, dict[int, _Class]] = field(default_factory=dict)


class FairQueue:
    """Waiting requests of one engine, in the order in which they are to be admitted."""

    def __init__(self, service: TenantService, admission: Admission = Admission.FAIR) -> None:
        self.service = service
        self.admission = admission
        self.now_s = 0.0
        self.waiting_tokens: dict[str, int] = {}
        """By tenant."""

        self.queued_us = (0, 0)
        """Predicted microseconds of prompts, and of outputs alone, of all that wait; integers, so that sums are exact."""

        self._places: dict[str, tuple[Waiting, Place]] = {}
        self._tenants: dict[str, _Tenant] = {}
        self._order = Lowest(self._tenant_key)
        self._back = self._front = 0
        self._chosen: str | None = None
        self._ahead: deque[str] = deque()
        service.watch(self._fell)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._places

    def __iter__(self) -> Iterator[Waiting]:
        """All that wait, as they came."""
        return (waiting for waiting, _ in sorted(self._places.values(), key=lambda each: each[1][1]))

    def begin_step(self, now_s: float) -> None:
        """Let time pass, and choose anew; a clock that jumps back counts as one that stands still."""
        self.now_s = max(self.now_s, now_s)
        self.service.begin_step()
        self._chosen = None
        self._ahead.clear()

    def let_ahead(self, request_ids: Iterable[str]) -> None:
        """Let requests go first until the step ends, in this order; those of another queue are left out."""
        self._ahead = deque(each for each in request_ids if each in self._places)
        self._chosen = None

    def add(self, waiting: Waiting, *, front: bool = False) -> None:
        """Let a request wait; in front of all others where the order is first come.

        What was held for it is refunded: it was not admitted after all, or was preempted.
        """
        assert waiting.request_id not in self, f"{waiting.request_id} waits already"
        self.service.release(waiting.request_id)
        self._front, self._back = (self._front - 1, self._back) if front else (self._front, self._back + 1)
        position = self._front if front else self._back
        arrival_s = waiting.arrival_s if self._is_fair(waiting) else 0.0
        self.service.arrives(waiting.account, waiting.request_id)
        self._insert(waiting, (arrival_s, position, waiting.request_id))
        self._count(waiting, 1)

    def rank(self) -> Rank | None:
        """Choose who goes first now, and return where it stands; None when nobody waits."""
        found = self._first()
        self._chosen = None if found is None else found[0]
        return None if found is None else found[1]

    def peek(self) -> Waiting:
        """Return whom the next `pop` will return.

        Raises:
            IndexError: Nobody waits.
        """
        if self._chosen is None and self.rank() is None:
            raise IndexError("peek from an empty queue")
        assert self._chosen is not None
        return self._places[self._chosen][0]

    def pop(self) -> Waiting:
        """Take out who goes first, and charge its tenant in advance.

        Raises:
            IndexError: Nobody waits.
        """
        waiting = self.peek()
        self.remove(waiting.request_id)
        self.service.hold(waiting.request_id, waiting.account, waiting.held)
        return waiting

    def remove(self, request_id: str) -> Waiting:
        """Take a request out, wherever it stands.

        Raises:
            KeyError: It does not wait here.
        """
        waiting, _ = self._take_out(request_id)
        self.service.leaves(waiting.account)
        self._count(waiting, -1)
        return waiting

    def first(self, num: int) -> list[Waiting]:
        """Return whom the next `num` calls of `pop` would return."""
        return _next(num, lambda: self if self._chosen is not None or self.rank() is not None else None, (self,))

    def follow(self, admission: Admission) -> None:
        """Order by another rule from now on."""
        if admission is self.admission:
            return
        self.begin_step(self.now_s)
        everybody = [self._take_out(request_id) for request_id in list(self._places)]
        self.admission = admission
        for waiting, (_, position, name) in everybody:
            self._insert(waiting, (waiting.arrival_s if self._is_fair(waiting) else 0.0, position, name))

    def check(self) -> None:
        """Assert what always holds; O(n)."""
        alive = 0
        for name, tenant in self._tenants.items():
            assert name in self._order, f"{name!r} has requests and no place"
            assert set(tenant.users) == set(tenant.classes), f"users of {name!r}"
            for of_user in tenant.classes.values():
                for each in of_user.values():
                    assert len(each.heap) > each.num_gone, f"a class of {name!r} is empty"
                    alive += len(each.heap) - each.num_gone
        assert len(self._order) == len(self._tenants)
        assert alive == len(self._places), f"{alive} requests stand in classes, {len(self._places)} wait"
        assert self._chosen is None or self._chosen in self._places, "the chosen one is gone"
        tokens: dict[str, int] = {}
        for waiting, _ in self._places.values():
            tokens[waiting.account.tenant] = tokens.get(waiting.account.tenant, 0) + waiting.num_tokens
        assert {name: num for name, num in tokens.items() if num} == self.waiting_tokens, "tokens are counted wrongly"
        queued = [waiting.queued_us for waiting, _ in self._places.values()]
        assert self.queued_us == (sum(one[0] for one in queued), sum(one[1] for one in queued)), (
            "work is counted wrongly"
        )

    def _count(self, waiting: Waiting, sign: int) -> None:
        """Count a request in, or out."""
        tenant = waiting.account.tenant
        if num := self.waiting_tokens.get(tenant, 0) + sign * waiting.num_tokens:
            self.waiting_tokens[tenant] = num
        else:
            self.waiting_tokens.pop(tenant, None)
        prompt_us, output_us = waiting.queued_us
        self.queued_us = self.queued_us[0] + sign * prompt_us, self.queued_us[1] + sign * output_us

    def _is_fair(self, waiting: Waiting) -> bool:
        return self.admission is Admission.FAIR and waiting.account.tenant != ANONYMOUS

    def _group(self, waiting: Waiting) -> tuple[str, str, int]:
        """Tenant, user and class under which a request stands."""
        if not self._is_fair(waiting):
            return ANONYMOUS, "", 0
        return *waiting.account, math.floor(math.log(waiting.s, CLASS_FACTOR))

    def _insert(self, waiting: Waiting, place: Place) -> None:
        name, user, number = self._group(waiting)
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(Lowest(lambda each: self._user_key(name, each)))
            self._order.add(name)
        if user not in tenant.classes:
            tenant.classes[user] = {}
            tenant.users.add(user)
        of_user = tenant.classes[user]
        if number not in of_user:
            of_user[number] = _Class()
        place = (place[0], place[1], waiting.request_id)  # a new object: an older one in the heap is of one who is gone
        heapq.heappush(of_user[number].heap, place)
        self._places[waiting.request_id] = waiting, place

    def _take_out(self, request_id: str) -> tuple[Waiting, Place]:
        waiting, place = self._places.pop(request_id)
        if self._chosen == request_id:
            self._chosen = None
        name, user, number = self._group(waiting)
        tenant = self._tenants[name]
        of_user = tenant.classes[user]
        each = of_user[number]
        each.num_gone += 1
        self._prune(each)
        if not each.heap:
            del of_user[number]
        if not of_user:
            del tenant.classes[user]
            tenant.users.discard(user)
        if not tenant.classes:
            del self._tenants[name]
            self._order.discard(name)
        return waiting, place

    def _prune(self, each: _Class) -> None:
        """Keep the top of a class true, and its heap no longer than twice what is alive."""
        if each.num_gone * 2 > len(each.heap) + SPARE_ENTRIES:
            each.heap = [place for place in each.heap if self._is_at(place)]
            heapq.heapify(each.heap)
            each.num_gone = 0
        while each.heap and not self._is_at(each.heap[0]):
            heapq.heappop(each.heap)
            each.num_gone -= 1

    def _is_at(self, place: Place) -> bool:
        found = self._places.get(place[2])
        return found is not None and found[1] is place

    def _first(self) -> tuple[str, Rank] | None:
        while self._ahead and self._ahead[0] not in self._places:
            self._ahead.popleft()
        if self._ahead:
            return self._ahead[0], (-math.inf, "", 0.0, "", 0.0, 0.0, 0)
        tenant_first = self._order.lowest()
        if tenant_first is None:
            return None
        tenant_key, name = tenant_first
        tenant = self._tenants[name]
        user_first = tenant.users.lowest()
        assert user_first is not None, f"{name!r} has no user"
        user_key, user = user_first
        heads = (self._places[each.heap[0][2]] for each in tenant.classes[user].values())
        ratio, (arrival_s, position, request_id) = min(
            (-waiting.ratio(self.now_s) if self._is_fair(waiting) else 0.0, place) for waiting, place in heads
        )
        return request_id, (tenant_key, name, user_key, user, ratio, arrival_s, position)

    def _tenant_key(self, name: str) -> float:
        return 0.0 if self.admission is Admission.FIRST_COME else self.service.tenant_key(name)

    def _user_key(self, tenant: str, user: str) -> float:
        return 0.0 if self.admission is Admission.FIRST_COME else self.service.user_key(Account(tenant, user))

    def _fell(self, account: Account) -> None:
        self._order.fell(account.tenant)
        if (tenant := self._tenants.get(account.tenant)) is not None:
            tenant.users.fell(account.user)


def first_of(skipped: FairQueue, waiting: FairQueue) -> FairQueue | None:
    """Which of vLLM's two queues the next request comes from: the fair order, and vLLM's (skipped first) without stamps."""
    skipped_rank, waiting_rank = skipped.rank(), waiting.rank()
    if skipped_rank is None or waiting_rank is None:
        return skipped if skipped_rank is not None else waiting if waiting_rank is not None else None
    if skipped_rank[:2] == waiting_rank[:2] and skipped_rank[1] == ANONYMOUS:
        return skipped
    return skipped if skipped_rank < waiting_rank else waiting


def next_of(skipped: FairQueue, waiting: FairQueue, num: int) -> list[Waiting]:
    """Return the next `num` requests of both queues, if all were admitted."""
    return _next(num, lambda: first_of(skipped, waiting), (skipped, waiting))


def _next(num: int, choose: Callable[[], FairQueue | None], queues: Sequence[FairQueue]) -> list[Waiting]:
    """Take requests out and charge them as `pop` does, then put all as it was."""
    before, charges = [(queue._chosen, queue._ahead.copy()) for queue in queues], not _are_of_one(queues)
    popped: list[tuple[FairQueue, Waiting, Place]] = []
    while len(popped) < num and (queue := choose()) is not None:
        assert queue._chosen is not None
        waiting, place = queue._take_out(queue._chosen)
        popped.append((queue, waiting, place))
        if charges:
            queue.service.hold(waiting.request_id, waiting.account, waiting.held)
    for queue, waiting, place in popped:
        if charges:
            queue.service.release(waiting.request_id)
        queue._insert(waiting, place)
    for queue, (chosen, ahead) in zip(queues, before, strict=True):
        queue._chosen, queue._ahead = chosen, ahead
    return [waiting for _, waiting, _ in popped]


def _are_of_one(queues: Sequence[FairQueue]) -> bool:
    """Whether all who wait are one user's: what is charged in advance then changes no order."""
    if any(len(queue._tenants) > 1 for queue in queues):
        return False
    users = {(name, user) for queue in queues for name, tenant in queue._tenants.items() for user in tenant.classes}
    return len(users) <= 1
