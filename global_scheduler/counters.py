"""Virtual token counters: how much normalised service every tenant, and every user within a tenant, has had in the cluster.

Rules:
- Tenants of a pool are one `Level`, the users of each tenant another; `level.py` says how counters rise and are lifted.
- A tenant has at most `max_users` accounts of users; its further users share one.
- A tenant's only user is where its tenant is and is ordered among nobody: for most tenants there is one level alone.
"""

import math
from dataclasses import dataclass
from typing import Any

from cost_service.charges import OTHER_USERS, Account
from global_scheduler.level import Level

MAX_USERS = 64


@dataclass(slots=True)
class _Sole:
    """The only user of a tenant: it is where its tenant is, and there is nobody to order it among."""

    user: str
    counter: float = 0.0


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
        self._soles: dict[str, _Sole] = {}
        self._users: dict[str, Level] = {}  # of the tenants that have more than one
        self._sharing: dict[tuple[str, str], dict[str, bool]] = {}  # further users by tenant and replica; who waits

    def users(self, tenant: str) -> Level:
        """Counters of a tenant's users; a copy where it has one alone, or none."""
        sole = self._soles.get(tenant)
        if sole is not None:
            return Level.of_one(sole.user, sole.counter, self.tenants.places_of(tenant))
        return self._users.get(tenant) or Level()

    def several_users(self, tenant: str) -> Level | None:
        """Counters of a tenant's users; None where it has one alone, or none."""
        return self._users.get(tenant)

    def charge(self, account: Account, service: float, *, admitted: bool = False) -> None:
        """Add service to a tenant and its user, see `Level`; a negative one is a refund."""
        tenant = account.tenant
        sole = self._sole(account)
        if sole is not None:
            sole.counter = max(0.0, sole.counter + service)
        else:
            self._users[tenant].charge(self._user(account), service, admitted=admitted)
        self.tenants.charge(tenant, service, admitted=admitted)
        self._drop(tenant)

    def set_present(self, account: Account, replica: str, *, waiting: bool, running: bool, lifts: bool = True) -> None:
        """Say whether requests of a user wait and run at a replica; see `Level`. An unknown user is lifted in any case."""
        if self._sole(account) is None:
            users, user = self._users[account.tenant], account.user
            if user != OTHER_USERS and users.is_at(user, replica, waiting=waiting, running=running):
                return
            user, waiting, running = self._shared(account, replica, waiting, running)
            users.set_present(user, replica, waiting=waiting, running=running, lifts=lifts or user not in users)
            waiting, running = users.presence_at(replica)
        tenant = account.tenant
        if not self.tenants.is_at(tenant, replica, waiting=waiting, running=running):
            self.tenants.set_present(tenant, replica, waiting=waiting, running=running, lifts=lifts)
        self._drop(tenant)

    def remove_replica(self, replica: str) -> None:
        """Nobody waits or runs there any more."""
        for tenant in list(self._users):
            self._sharing.pop((tenant, replica), None)
            self._users[tenant].remove_replica(replica)
        self.tenants.remove_replica(replica)
        for tenant in [*self._users, *self._soles]:
            self._drop(tenant)

    def fold(self) -> None:
        """Forget idle tenants whom the others have caught up with, and with them what their users owe each other."""
        for tenant in self.tenants.fold():
            self._drop(tenant)

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON values."""
        return {
            "tenants": self.tenants.state(),
            "soles": {tenant: [sole.user, sole.counter] for tenant, sole in self._soles.items()},
            "users": {tenant: users.state() for tenant, users in self._users.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a stored state; only where nothing has happened yet.

        Raises:
            ValueError: A stored counter is no number from 0 on.
        """
        self.tenants.restore(state["tenants"])
        self._soles = {tenant: _Sole(user, counter) for tenant, (user, counter) in state["soles"].items()}
        for tenant, users in state["users"].items():
            self._users[tenant] = Level()
            self._users[tenant].restore(users)

    def check(self) -> None:
        """Assert what always holds; O(n)."""
        self.tenants.check()
        assert not self._soles.keys() & self._users.keys(), "a tenant has one user alone, and several"
        strangers = (self._soles.keys() | self._users.keys()) - set(self.tenants)
        assert not strangers, (
            f"users of {strangers}, who are no tenants"
        )  # a tenant of whom replicas only know has none
        for tenant, users in self._users.items():
            users.check()
            assert len(users) <= self.max_users + 1, f"{tenant!r} has {len(users)} accounts of users"
            for replica in self.tenants.places_of(tenant):
                assert users.presence_at(replica)[1], f"{tenant!r} is at {replica} and none of its users is"

    def _drop(self, tenant: str) -> None:
        """Forget the users of a tenant that is forgotten."""
        if tenant not in self.tenants:
            self._soles.pop(tenant, None)
            self._users.pop(tenant, None)

    def _sole(self, account: Account) -> _Sole | None:
        """The account if it is its tenant's only one; None if there are others, who are told apart from now on."""
        tenant, user = account
        sole = self._soles.get(tenant)
        if sole is not None:
            if sole.user == user:
                return sole
            del self._soles[tenant]
            self._users[tenant] = Level.of_one(sole.user, sole.counter, self.tenants.places_of(tenant))
        elif tenant not in self._users:
            if user != OTHER_USERS:
                sole = self._soles[tenant] = _Sole(user)
                return sole
            self._users[tenant] = Level()
        return None

    def _shared(self, account: Account, replica: str, waiting: bool, running: bool) -> tuple[str, bool, bool]:
        """The account that stands for a user of a tenant that has several, and whether it waits and runs at a replica.

        A replica's own further users come under the name of those who share, beside users whom only we let share.
        """
        tenant, user = account
        sharing = self._sharing.get((tenant, replica), {})
        if user != OTHER_USERS and user not in sharing and self._user(account) == user:
            return user, waiting, running
        sharing[user] = waiting
        if not waiting and not running:
            del sharing[user]
        self._sharing[tenant, replica] = sharing
        if not sharing:
            del self._sharing[tenant, replica]
        return OTHER_USERS, any(sharing.values()), bool(sharing)

    def _user(self, account: Account) -> str:
        """The account of users that pays: its own, or the one that further users share."""
        users, user = self._users[account.tenant], account.user
        if user in users:
            return user
        if len(users) >= self.max_users:
            users.fold()
        return user if len(users) - (OTHER_USERS in users) < self.max_users else OTHER_USERS
