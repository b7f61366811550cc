"""How far service has strayed from fair, and whether the stated bound holds, after every event and for thousands of tenants.

Rules:
- Two tenants are compared over intervals in which both wait all the time. What their difference W_f / phi_f - W_g / phi_g
  ranges over there is the gap that the bound is about.
- Pairs are too many. Each tenant is compared with one reference V instead, the least normalised service among those who
  wait: its lead is x = W / phi - V. The difference of two tenants is the difference of their leads, whatever V is, so it
  ranges over no more than both leads do together. So what is reported is never below the true gap.
- A lead rises only when its tenant is served and falls only when others are: its extremes lie just before and after its own
  service. So an event costs O(log n).
- The verdict is per tenant: no lead ranges over more than (U + epsilon) / phi. That gives the bound for every pair.
- Tenants are compared within groups: those whom the same replicas hold back (`max_min.py`).

It sees service and who waits, nothing else: no policy's counters. Source: lemma 4.3 of VTC (arXiv:2401.00588).
"""

from dataclasses import dataclass, field

from cost_service.charges import checked_weight
from cost_service.lowest import Lowest
from global_scheduler.bound import FairnessBound
from global_scheduler.level import Level as Counters

HERE = "here"
"""All replicas together, as one place to wait at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """The two tenants of one group who strayed most, over the time that each has waited."""

    tenants: tuple[str, ...] = ()
    gap: float = 0.0
    """At most so much normalised service apart."""

    bound: float = 0.0
    ratio: float = 0.0
    """gap / bound"""

    stray: float = 0.0
    """The largest lead's range, as a share of (U + epsilon) / phi; the bound is broken above 1."""


@dataclass(slots=True)
class _Period:
    """A tenant from when it began to wait until now."""

    low: float
    high: float

    @property
    def range(self) -> float:
        return self.high - self.low


@dataclass(slots=True)
class _Group:
    counters: Counters = field(default_factory=Counters)
    periods: dict[str, _Period] = field(default_factory=dict)
    strays: Lowest = field(init=False)  # the lowest is who strayed most

    def __post_init__(self) -> None:
        self.strays = Lowest(lambda name: -self.stray(name))

    def lead(self, tenant: str) -> float:
        return self.counters.counter(tenant) - self.counters.virtual_time

    def stray(self, tenant: str) -> float:
        return self.periods[tenant].range * self.counters.weight(tenant)

    def note(self, tenant: str) -> None:
        """Take the lead of now into the tenant's range."""
        period, lead = self.periods[tenant], self.lead(tenant)
        if not period.low <= lead <= period.high:
            period.low, period.high = min(period.low, lead), max(period.high, lead)
            self.strays.fell(tenant)

    def begin(self, tenant: str) -> None:
        lead = self.lead(tenant)
        self.periods[tenant] = _Period(lead, lead)
        self.strays.add(tenant)

    def end(self, tenant: str) -> None:
        del self.periods[tenant]
        self.strays.discard(tenant)

    def leaders(self) -> list[str]:
        """The two tenants who strayed most, or fewer."""
        first = self.strays.lowest()
        if first is None:
            return []
        self.strays.discard(first[1])
        second = self.strays.lowest()
        self.strays.add(first[1])
        return [first[1]] if second is None else [first[1], second[1]]


class FairnessChecker:
    """Gap and bound of all tenants, from events."""

    def __init__(self, bound: FairnessBound) -> None:
        self.bound = bound
        self.worst = Gap()
        """The largest stray of all time."""
        self._groups: dict[str, _Group] = {}
        self._group_of: dict[str, str] = {}
        self._weights: dict[str, float] = {}

    @property
    def broken(self) -> bool:
        """Whether the bound was ever broken."""
        return self.worst.stray > 1.0

    def set_weight(self, tenant: str, weight: float) -> None:
        """Compare a tenant by another weight; its time of waiting begins anew.

        Raises:
            ValueError: The weight is out of range.
        """
        self._weights[tenant] = checked_weight(weight)
        self._begin_anew(tenant, self._group_of.get(tenant, ""))

    def set_group(self, tenant: str, group: str) -> None:
        """Compare a tenant with others than before; its time of waiting begins anew."""
        if self._group_of.get(tenant, "") != group:
            self._begin_anew(tenant, group)

    def set_waiting(self, tenant: str, waiting: bool) -> None:
        """Say whether a tenant has a request anywhere that is not admitted."""
        group = self._group(tenant)
        if waiting == (tenant in group.periods):
            return
        if waiting:
            group.counters.set_weight(tenant, self._weights.get(tenant, 1.0))
            group.counters.set_present(tenant, HERE, waiting=True, running=False)
            group.begin(tenant)
        else:
            self._note(tenant)
            group.counters.set_present(tenant, HERE, waiting=False, running=False)
            group.end(tenant)

    def serve(self, tenant: str, service: float) -> None:
        """Count service that was given, to a waiting tenant or not."""
        group = self._group(tenant)
        if tenant in group.periods:
            self._note(tenant)
            group.counters.charge(tenant, service)
            self._note(tenant)
        elif tenant in group.counters:
            group.counters.charge(tenant, service)

    def gap(self) -> Gap:
        """Return where things stand now, over all groups; O(tenants), for gauges and ends of runs."""
        for group in self._groups.values():
            for tenant in list(group.periods):
                self._note(tenant)
        return max((self._gap(group) for group in self._groups.values()), key=lambda gap: gap.stray, default=Gap())

    def _note(self, tenant: str) -> None:
        group = self._group(tenant)
        group.note(tenant)
        if group.stray(tenant) > self.worst.stray * self.bound.unit:
            self.worst = self._gap(group)

    def _gap(self, group: _Group) -> Gap:
        leaders = group.leaders()
        if not leaders:
            return Gap()
        weights = [group.counters.weight(name) for name in leaders]
        bound = self.bound.pair(weights[0], weights[-1])
        gap = sum(group.periods[name].range for name in leaders)
        stray = group.stray(leaders[0]) / self.bound.unit
        return Gap(tenants=tuple(leaders), gap=gap, bound=bound, ratio=gap / bound, stray=stray)

    def _group(self, tenant: str) -> _Group:
        name = self._group_of.get(tenant, "")
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = _Group()
        return group

    def _begin_anew(self, tenant: str, group: str) -> None:
        waits = tenant in self._group(tenant).periods
        if waits:
            self.set_waiting(tenant, False)
        self._group_of[tenant] = group
        if waits:
            self.set_waiting(tenant, True)
