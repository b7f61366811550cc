"""What the replicas of a pool report, and what they are told: ledger and counters as one object; no clock, no network.

Rules:
- A report is merged, what it adds is charged, then who waits and runs where is noted: in this order, so that nobody is
  lifted by service that it had before.
- An answer is absolute: per account its counter, what of the asking replica's own totals is in it, and whether it waits
  elsewhere. An answer may be lost or repeated; a replica adds what it has served beyond.
- A new epoch of a replica takes the old one's place: nobody waits or runs there any more but those whom it names.
- Answers hold what changed since the version that the replica has; a replica of another life has version 0 and gets all.
- A stored state says who waits where, too: nobody is lifted because the scheduler was away. Totals since then are charged:
  nothing is lost and nothing counts twice, however old it is.
- After a loss of all state, the first reports carry what each replica knew of the counters: the highest word is taken, and
  the totals of that report are a beginning, not a charge. So at most the others' service since their last answer is lost.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from cost_service.charges import MAX_COUNT, NOTHING, SYSTEM, Account, ServiceUnit
from cost_service.lowest import SPARE_ENTRIES
from cost_service.service_messages import AccountReport, Answer, Known, Report, Share
from global_scheduler.counters import FairCounters
from global_scheduler.ledger import ABSENT, Ledger


class FairShare:
    """Fairness state of one pool."""

    def __init__(self, counters: FairCounters | None = None, unit: ServiceUnit | None = None) -> None:
        self.counters = counters or FairCounters()
        self.unit = unit or ServiceUnit()
        self.ledger = Ledger()
        self.version = 0
        self._restored = False
        self._changed: dict[str, int] = {}  # tenants by the version of their last change
        self._reserved: dict[str, dict[Account, float]] = {}  # service by replica
        self._reserved_at: dict[tuple[str, str], float] = {}  # sums by tenant and replica
        self._reserved_of: dict[str, float] = {}  # sums by tenant

    def add_replica(self, replica: str) -> None:
        """Expect reports of a replica."""
        self.ledger.add_replica(replica)

    def remove_replica(self, replica: str) -> None:
        """Nobody waits or runs there any more, and what was reserved there will not be served."""
        self.ledger.remove_replica(replica)
        self.counters.remove_replica(replica)
        touched: dict[str, None] = {}
        for account in list(self._reserved.get(replica, ())):
            self._reserve(replica, account, 0.0)
            touched[account.tenant] = None
        self._reserved.pop(replica, None)
        self._touch(touched)

    def set_weight(self, tenant: str, weight: float) -> None:
        """Charge a tenant by another weight from now on.

        Raises:
            ValueError: The weight is out of range.
        """
        before = self.counters.tenants.weight(tenant)
        self.counters.tenants.set_weight(tenant, weight)
        if weight != before:
            self._touch({tenant: None})

    def take(self, report: Report, *, known: Mapping[str, float] | None = None) -> None:
        """Merge a report.

        Args:
            known: Counters of tenants as the replica knows them; None if it has never reported before. They are used if its
                epoch is new to us and no state was restored, see the rules.

        Raises:
            ValueError: The report or a known counter is impossible, or the replica unknown; nothing has changed then.
        """
        for tenant, counter in (known or {}).items():
            if not 0.0 <= counter < MAX_COUNT:
                raise ValueError(
                    f"The counter of {tenant!r} at {report.replica!r} is {counter!r}; it must be from 0 to 2^53."
                )
        epoch, before = self.ledger.current(report.replica), self.ledger.present(report.replica)
        begins = known is not None and not self._restored and not self.ledger.knows(report.replica, report.epoch)
        added, newest = self.ledger.merge(report)
        touched: dict[str, None] = {}
        for account, served in added.items():
            touched[account.tenant] = None
            if not begins and account.tenant != SYSTEM:
                admitted = served.num_input_tokens + served.num_cached_tokens > 0
                self.counters.charge(account, self.unit.service(served), admitted=admitted)
        if begins and known is not None:
            lines = {account: line for account, line in report.accounts.items() if account.tenant in known}
            self._note_presence(report.replica, lines, touched, lifts=False)
            for tenant, counter in known.items():
                self.counters.tenants.raise_to(tenant, counter)
                touched[tenant] = None
        if newest and epoch not in (None, report.epoch):
            now = self.ledger.present(report.replica)
            gone = dict.fromkeys((account for account in before if account not in now), ABSENT)
            self._note_presence(report.replica, {**now, **gone}, touched)
        elif newest:
            self._note_presence(report.replica, report.accounts, touched)
        self.counters.fold()
        self._touch(touched)

    def answer(self, replica: str, epoch: str, *, since: int) -> Answer:
        """Return what has changed for a replica since a version that it has; 0 for everything.

        Its size is the number of tenants that any replica has reported since then: all that are active, at most.
        """
        if since > self.version:  # a version of another life
            since = 0
        changed: list[str] = []
        for tenant, version in reversed(self._changed.items()):
            if version <= since:
                break
            changed.append(tenant)
        return Answer(version=self.version, shares=self._shares(changed, replica, epoch))

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON values."""
        return {"counters": self.counters.state(), "ledger": self.ledger.state(), "version": self.version}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a stored state; only where nothing has happened yet.

        Raises:
            ValueError: The state is damaged.
        """
        self.ledger = Ledger.restored(state["ledger"])
        self.counters.restore(state["counters"])
        self.version = int(state["version"])
        self._restored = True
        for replica in sorted(self.ledger.replicas):
            self._note_presence(replica, self.ledger.present(replica), {}, lifts=False)
        self._touch(dict.fromkeys(self.counters.tenants))

    def check(self) -> None:
        """Assert what always holds; O(n)."""
        self.ledger.check()
        self.counters.check()

    def _note_presence(
        self, replica: str, lines: Mapping[Account, AccountReport], touched: dict[str, None], *, lifts: bool = True
    ) -> None:
        """Say who waits and runs at a replica, and note whom that touches."""
        set_present, reserved = self.counters.set_present, self._reserved.setdefault(replica, {})
        for account, line in lines.items():
            if account.tenant == SYSTEM:
                continue
            waiting, running = line.num_waiting > 0, line.num_running > 0
            set_present(account, replica, waiting=waiting, running=running, lifts=lifts)
            if line.reserved or account in reserved:
                self._reserve(replica, account, line.reserved)
            touched[account.tenant] = None

    def _reserve(self, replica: str, account: Account, reserved: float) -> None:
        accounts = self._reserved.setdefault(replica, {})
        change = reserved - accounts.pop(account, 0.0)
        if reserved:
            accounts[account] = reserved
        if change:
            tenant = account.tenant
            _add(self._reserved_at, (tenant, replica), change)
            _add(self._reserved_of, tenant, change)

    def _touch(self, tenants: Mapping[str, None]) -> None:
        """Begin a version in which these have changed."""
        self.version += 1
        changed, version = self._changed, self.version
        for tenant in tenants:
            changed.pop(tenant, None)  # the last that changed stands last
            changed[tenant] = version
        if len(changed) > 2 * len(self.counters.tenants) + SPARE_ENTRIES:
            # whoever was forgotten is told anew when it returns, and its weight with it
            self._changed = {name: at for name, at in changed.items() if name in self.counters.tenants}

    def _shares(self, names: list[str], replica: str, epoch: str) -> list[Share]:
        """What a replica is told of tenants; for thousands of them in a second, so all that can be looked up before is."""
        tenants, users_of, service = self.counters.tenants, self.counters.several_users, self.unit.service
        totals, reserved_of, reserved_at = self.ledger.epoch(replica, epoch), self._reserved_of, self._reserved_at
        shares = []
        for name in names:
            counter, weight = tenants.counter(name), tenants.weight(name)
            if name in reserved_of:
                counter += (reserved_of[name] - reserved_at.get((name, replica), 0.0)) / weight
            total = totals.tenants.get(name)
            known = Known(counter=counter, included=0.0 if total is None else service(total))
            share = Share(tenant=name, known=known, weight=weight, waits=tenants.is_waiting(name))
            users = users_of(name)
            if users is not None and len(users) > 1:
                for user in users:
                    included = service(totals.totals.get(Account(name, user), NOTHING))
                    share.users[user] = Known(counter=users.counter(user), included=included)
            shares.append(share)
        return shares


K = TypeVar("K")


def _add(sums: dict[K, float], key: K, change: float) -> None:
    """Add to a sum; one that is nothing is dropped. Engines reserve fractions of 2, whose sums are exact."""
    total = sums.get(key, 0.0) + change
    if total > 0.0:
        sums[key] = total
    else:
        sums.pop(key, None)
