"""Virtual token counters: how much normalised service every tenant, and every user within a tenant, has had in the cluster.

Rules, on both levels alike:
- A counter rises by service / weight as service is given; it falls by refunds alone, and never below its last lift.
- *Waiting* is what VTC calls backlogged: a request that is not admitted, at any replica. Who begins to wait anywhere is
  lifted: to the least counter among those who wait at the replicas it waits at, whichever replica's is most; with nobody
  there, to the least who waits anywhere; with nobody waiting at all, to the last who ceased to. Otherwise unused time could
  be saved up.
- Who waits already and begins to wait at another replica keeps its counter, but not more than `credit` / weight below the
  least there: being held up at one busy replica is no claim to the others.
- Who was admitted without being seen waiting came and went between two reports: lifted, then charged, and where nobody waits
  it is the last who ceased to. Else counters would drift apart while nobody waits, and whoever had used little would take
  all when both begin to.
- Who is neither waiting nor running is forgotten once its counter is at most what a lift would give it: nothing is lost.
  A higher one is debt and is kept until the others have caught up.
- A tenant has at most `max_users` accounts of users; its further users share one.

With one replica this is VTC (arXiv:2401.00588, algorithm 2), the branch for the last tenant that left included. Lifting by
replica differs from it only where tenants wait at different replicas: a newcomer that is lifted to a tenant which one busy
replica holds back would have all others to itself until it is as far behind.
"""

import heapq
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from cost_service.charges import OTHER_USERS, Account, checked_weight
from cost_service.lowest import SPARE_ENTRIES, Lowest

MAX_USERS = 64


class Level:
    """Counters of all tenants of a pool, or of all users of a tenant."""

    def __init__(self, *, credit: float = math.inf) -> None:
        self.credit = credit
        """Normalised service at weight 1 that waiting elsewhere may be ahead by; see the rules."""
        self._weights: dict[str, float] = {}
        self._counters: dict[str, float] = {}
        self._lifts: dict[str, float] = {}
        self._present: dict[str, dict[str, bool]] = {}  # replicas with requests of a name, and whether any waits there
        self._num_present_at: Counter[str] = Counter()
        self._waiting = Lowest(self.counter)
        self._waiting_at: dict[str, Lowest] = {}
        self._last: str | None = None  # who ceased to wait last when nobody was left
        self._floor = 0.0  # its counter, should it be forgotten
        self._debtors: list[tuple[float, str]] = []

    def __contains__(self, name: object) -> bool:
        return name in self._counters

    def __len__(self) -> int:
        return len(self._counters)

    def __iter__(self) -> Iterator[str]:
        return iter(self._counters)

    def counter(self, name: str) -> float:
        """Normalised service, lifts included; 0 for strangers."""
        return self._counters.get(name, 0.0)

    def weight(self, name: str) -> float:
        return self._weights.get(name, 1.0)

    def is_waiting(self, name: str) -> bool:
        """Whether it has a waiting request at any replica."""
        return name in self._waiting

    @property
    def virtual_time(self) -> float:
        """The least counter among those who wait, or the last who did."""
        lowest = self._waiting.lowest()
        if lowest is not None:
            return lowest[0]
        return self._floor if self._last is None else max(self._floor, self.counter(self._last))

    def virtual_time_at(self, replica: str) -> float | None:
        """The least counter among those who wait at that replica, or None."""
        here = self._waiting_at.get(replica)
        lowest = here.lowest() if here is not None else None
        return None if lowest is None else lowest[0]

    def set_weight(self, name: str, weight: float) -> None:
        """Charge by another weight from now on; what was charged stays.

        Raises:
            ValueError: The weight is out of range.
        """
        self._weights[name] = checked_weight(weight)

    def charge(self, name: str, service: float, *, admitted: bool = False) -> None:
        """Add service; a negative one is a refund. With `admitted` it holds prompts of requests that began."""
        assert math.isfinite(service), f"{name!r} is charged {service}"
        passed = admitted and name not in self._waiting
        if passed or name not in self._present:
            self._lift(name, self.virtual_time)
        if passed and not self._waiting:
            self._last, self._floor = name, self.virtual_time
        before = self._counters.get(name, 0.0)
        self._counters[name] = after = max(before + service / self.weight(name), self._lifts.get(name, 0.0))
        if after < before:
            self._fell(name)
        if name not in self._present:
            self._left(name)

    def set_present(self, name: str, replica: str, *, waiting: bool, running: bool, lifts: bool = True) -> None:
        """Say whether requests of a name wait and run at a replica; charges of the same report come first.

        Without `lifts` it was there before, and is only learned now: a scheduler that was away is told what was.
        """
        if name not in self._counters and (waiting or running):
            self._lift(name, self.virtual_time if lifts and not waiting else 0.0)
        places = self._present.setdefault(name, {})
        was_waiting = places.get(replica, False)
        if waiting and not was_waiting:
            self._begins_to_wait(name, replica, lifts=lifts)
        elif was_waiting and not waiting:
            self._ceases_to_wait(name, replica)
        self._num_present_at[replica] += (waiting or running) - (replica in places)
        if waiting or running:
            places[replica] = waiting
        else:
            places.pop(replica, None)
        if not places:
            del self._present[name]
            self._left(name)

    def presence_at(self, replica: str) -> tuple[bool, bool]:
        """Whether anybody waits at a replica, and whether anybody waits or runs there."""
        return bool(self._waiting_at.get(replica)), self._num_present_at[replica] > 0

    def replicas_of(self, name: str) -> list[str]:
        """Where it waits or runs."""
        return list(self._present.get(name, ()))

    def remove_replica(self, replica: str) -> None:
        """Nobody waits or runs there any more."""
        for name in [name for name, places in self._present.items() if replica in places]:
            self.set_present(name, replica, waiting=False, running=False)
        self._waiting_at.pop(replica, None)
        del self._num_present_at[replica]

    def raise_to(self, name: str, counter: float) -> None:
        """Take over a counter that an earlier life of the scheduler had told, if it is higher."""
        assert math.isfinite(counter), f"{name!r} is to have {counter}"
        self._lift(name, counter)
        if name not in self._present:
            self._left(name)

    def fold(self) -> list[str]:
        """Forget idle debtors whom the others have caught up with; return whom."""
        folded = []
        floor = self.virtual_time
        while self._debtors and self._debtors[0][0] <= floor:
            _, name = heapq.heappop(self._debtors)
            if name in self._counters and name not in self._present:
                if (counter := self._counters[name]) <= floor:
                    self._forget(name)
                    folded.append(name)
                else:
                    heapq.heappush(self._debtors, (counter, name))
        return folded

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON values; who is present is told again, without lifts."""
        return {
            "counters": dict(self._counters),
            "lifts": {name: self._lifts[name] for name in self._counters if name in self._lifts},
            "floor": self.virtual_time,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a stored state; only where nothing has happened yet."""
        assert not self._counters, "a state is restored over counters"
        for name, counter in state["counters"].items():
            if not math.isfinite(counter) or counter < 0.0:
                raise ValueError(f"The stored counter of {name!r} is {counter!r}; it must be a number from 0 on.")
        self._counters = dict(state["counters"])
        self._lifts = dict(state["lifts"])
        self._floor = float(state["floor"])
        self._debtors = [(counter, name) for name, counter in self._counters.items()]
        heapq.heapify(self._debtors)

    def check(self) -> None:
        """Assert what always holds; O(n)."""
        waiting = {name for name, places in self._present.items() if any(places.values())}
        assert waiting == set(self._waiting), "who waits anywhere is not who is said to"
        for replica, here in self._waiting_at.items():
            assert set(here) == {name for name, places in self._present.items() if places.get(replica)}, replica
        for name in waiting:
            assert name in self._counters, f"{name!r} waits without a counter"
        indexed = {name for _, name in self._debtors}
        assert all(name in indexed for name in self._counters if name not in self._present), (
            "a debtor would stay for ever"
        )
        assert all(self._counters[name] >= lift for name, lift in self._lifts.items()), (
            "a refund fell below the last lift"
        )

    def _begins_to_wait(self, name: str, replica: str, *, lifts: bool) -> None:
        here = self.virtual_time_at(replica)
        if name not in self._waiting:
            if lifts:
                self._lift(name, self.virtual_time if here is None else here)
            self._waiting.add(name)
        elif lifts and here is not None:
            self._lift(name, here - self.credit / self.weight(name))
        self._waiting_at.setdefault(replica, Lowest(self.counter)).add(name)

    def _ceases_to_wait(self, name: str, replica: str) -> None:
        self._waiting_at[replica].discard(name)
        if not any(waiting for place, waiting in self._present[name].items() if place != replica):
            floor = self.virtual_time
            self._waiting.discard(name)
            if not self._waiting:
                self._last, self._floor = name, floor

    def _lift(self, name: str, floor: float) -> None:
        if floor > self._counters.get(name, 0.0) or name not in self._counters:
            self._counters[name] = self._lifts[name] = max(0.0, floor, self._counters.get(name, 0.0))

    def _fell(self, name: str) -> None:
        self._waiting.fell(name)
        for replica in self._present.get(name, ()):
            if replica in self._waiting_at:
                self._waiting_at[replica].fell(name)

    def _left(self, name: str) -> None:
        """Forget who has nothing left here, or note the debt."""
        if name not in self._counters:
            return
        if name != self._last and self._counters[name] <= self.virtual_time:
            self._forget(name)
        else:
            heapq.heappush(self._debtors, (self._counters[name], name))
            if len(self._debtors) > 2 * len(self._counters) + SPARE_ENTRIES:
                self._debtors = [(counter, n) for n, counter in self._counters.items() if n not in self._present]
                heapq.heapify(self._debtors)

    def _forget(self, name: str) -> None:
        if name == self._last:
            self._floor = max(self._floor, self._counters[name])
        del self._counters[name]
        self._lifts.pop(name, None)


NOBODY = Level()
"""Users of a tenant without any; nothing is ever added to it."""


class FairCounters:
    """Counters of one pool: tenants, and users within each."""

    def __init__(self, *, max_users: int = MAX_USERS, credit: float = math.inf) -> None:
        """Start with nobody.

        Args:
            max_users: Accounts of users that a tenant may have beside the one which its further users share.
            credit: See `Level.credit`; the stated bound is a good value.
        """
        if max_users < 1:
            raise ValueError("max_users must be at least 1; with 1 nearly all users of a tenant share an account.")
        self.tenants = Level(credit=credit)
        self.max_users = max_users
        self._users: dict[str, Level] = {}
        self._sharing: dict[tuple[str, str], dict[str, bool]] = {}  # further users by tenant and replica; who waits

    def users(self, tenant: str) -> Level:
        """Counters of a tenant's users."""
        return self._users.get(tenant, NOBODY)

    def charge(self, account: Account, service: float, *, admitted: bool = False) -> None:
        """Add service to a tenant and its user, see `Level`; a negative one is a refund."""
        self._level(account.tenant).charge(self._user(account), service, admitted=admitted)
        self.tenants.charge(account.tenant, service, admitted=admitted)
        self._drop(account.tenant)

    def set_present(self, account: Account, replica: str, *, waiting: bool, running: bool, lifts: bool = True) -> None:
        """Say whether requests of a user wait and run at a replica; see `Level`. An unknown user is lifted in any case."""
        tenant, user = account
        sharing = self._sharing.get((tenant, replica), {})
        users = self._level(tenant)
        if user in sharing or self._user(account) != user:
            sharing[user] = waiting
            if not waiting and not running:
                del sharing[user]
            user, waiting, running = OTHER_USERS, any(sharing.values()), bool(sharing)
            self._sharing[tenant, replica] = sharing
            if not sharing:
                del self._sharing[tenant, replica]
        users.set_present(user, replica, waiting=waiting, running=running, lifts=lifts or user not in users)
        waits, runs = users.presence_at(replica)
        self.tenants.set_present(tenant, replica, waiting=waits, running=runs, lifts=lifts)
        self._drop(tenant)

    def remove_replica(self, replica: str) -> None:
        """Nobody waits or runs there any more."""
        for tenant in list(self._users):
            self._sharing.pop((tenant, replica), None)
            self._users[tenant].remove_replica(replica)
        self.tenants.remove_replica(replica)
        for tenant in list(self._users):
            self._drop(tenant)

    def fold(self) -> None:
        """Forget idle tenants whom the others have caught up with, and with them what their users owe each other."""
        for tenant in self.tenants.fold():
            self._users.pop(tenant, None)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON values."""
        return {
            "tenants": self.tenants.state(),
            "users": {tenant: users.state() for tenant, users in self._users.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a stored state; only where nothing has happened yet.

        Raises:
            ValueError: A stored counter is no number from 0 on.
        """
        self.tenants.restore(state["tenants"])
        for tenant, users in state["users"].items():
            self._level(tenant).restore(users)

    def check(self) -> None:
        """Assert what always holds; O(n)."""
        self.tenants.check()
        for tenant, users in self._users.items():
            users.check()
            assert len(users) <= self.max_users + 1, f"{tenant!r} has {len(users)} accounts of users"
            for replica in self.tenants.replicas_of(tenant):
                assert users.presence_at(replica)[1], f"{tenant!r} is at {replica} and none of its users is"

    def _drop(self, tenant: str) -> None:
        """Forget the users of a tenant that is forgotten."""
        if tenant not in self.tenants:
            self._users.pop(tenant, None)

    def _level(self, tenant: str) -> Level:
        users = self._users.get(tenant)
        if users is None:
            users = self._users[tenant] = Level()
        return users

    def _user(self, account: Account) -> str:
        """The account of users that pays: its own, or the one that further users share."""
        users = self._level(account.tenant)
        if account.user in users:
            return account.user
        if len(users) >= self.max_users:
            users.fold()
        return account.user if len(users) - (OTHER_USERS in users) < self.max_users else OTHER_USERS
