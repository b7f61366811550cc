"""Where tenants of an engine, or users of a tenant, stand: what the cluster last said of each, and its service here since.

Rules:
- The key is `counter + (total - included + held) / weight`; who has the least goes first.
- Who comes back is lifted to the least who waits here, or to the last who did, and keeps that until the cluster knows of it.
- The cluster's word may be older than the total that it is about, never newer.
"""

from collections import Counter
from dataclasses import dataclass, field

from cost_service.lowest import ROUNDING, Lowest
from cost_service.service_messages import Known

FRACTION = 2**20
"""What is held counts in this fraction of a token, or of a second."""


@dataclass(slots=True)
class Standing:
    """One tenant or user."""

    weight: float = 1.0
    counter: float = 0.0
    included: float = 0.0
    total: float = 0.0
    held: float = 0.0
    lifted: float | None = None
    """What the key would be without service since the lift, until the cluster knows of it."""

    @property
    def key(self) -> float:
        return self.counter + (self.total - self.included + self.held) / self.weight

    def lift(self, floor: float) -> None:
        if (missing := floor - self.key) > 0.0:
            self.counter += missing
        self.lifted = self.counter - self.included / self.weight

    def learn(self, known: Known, *, confirmed: bool) -> None:
        # more than there was: a word from before the account was forgotten here; nothing of the present total is in it
        is_old = known.included > self.total * (1.0 + ROUNDING) + 1.0 / FRACTION
        self.counter, self.included = known.counter, 0.0 if is_old else known.included
        if confirmed:
            self.lifted = None
        elif self.lifted is not None:
            self.counter = max(self.counter, self.lifted + self.included / self.weight)


@dataclass(slots=True)
class Group:
    """Tenants of the engine, or users of a tenant: their standings, and who of them waits here."""

    standings: dict[str, Standing] = field(default_factory=dict)
    num_waiting: Counter[str] = field(default_factory=Counter)
    waiting: Lowest = field(init=False)
    last: str | None = None

    def __post_init__(self) -> None:
        self.waiting = Lowest(self.key)

    def key(self, name: str) -> float:
        standing = self.standings.get(name)
        return 0.0 if standing is None else standing.key

    def of(self, name: str) -> Standing:
        return self.standings.setdefault(name, Standing())

    def virtual_time(self) -> float:
        lowest = self.waiting.lowest()
        if lowest is not None:
            return lowest[0]
        return 0.0 if self.last is None else self.key(self.last)

    def arrives(self, name: str, *, returns: bool) -> None:
        self.num_waiting[name] += 1
        if self.num_waiting[name] == 1:
            if returns:
                self.of(name).lift(self.virtual_time())
            self.waiting.add(name)

    def leaves(self, name: str) -> None:
        self.num_waiting[name] -= 1
        assert self.num_waiting[name] >= 0, f"{name!r} has {self.num_waiting[name]} waiting requests"
        if self.num_waiting[name] == 0:
            del self.num_waiting[name]
            self.waiting.discard(name)
            self.last = name
