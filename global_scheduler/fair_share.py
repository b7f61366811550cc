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

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeVar

from cost_service.charges import MAX_COUNT, SYSTEM, Account, ServiceUnit
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
        self._changed: OrderedDict[str, int] = OrderedDict()  # tenants by the version of their last change
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
        for account in list(self._reserved.get(replica, ())):
            self._reserve(replica, account, 0.0)
            self._touch(account.tenant)

    def set_weight(self, tenant: str, weight: float) -> None:
        """Charge a tenant by another weight from now on.

        Raises:
            ValueError: The weight is out of range.
        """
        self.counters.tenants.set_weight(tenant, weight)
        self._touch(tenant)

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
        self.version += 1
        for account, served in added.items():
            if not begins and account.tenant != SYSTEM:
                admitted = served.num_input_tokens + served.num_cached_tokens > 0
                self.counters.charge(account, self.unit.service(served), admitted=admitted)
            self._touch(account.tenant)
        if begins and known is not None:
            lines = {account: line for account, line in report.accounts.items() if account.tenant in known}
            self._note_presence(report.replica, lines, lifts=False)
            for tenant, counter in known.items():
                self.counters.tenants.raise_to(tenant, counter)
                self._touch(tenant)
        if newest and epoch not in (None, report.epoch):
            now = self.ledger.present(report.replica)
            gone = dict.fromkeys((account for account in before if account not in now), ABSENT)
            self._note_presence(report.replica, {**now, **gone})
        elif newest:
            self._note_presence(report.replica, report.accounts)
        self.counters.fold()

    def answer(self, replica: str, epoch: str, *, since: int) -> Answer:
        """Return what has changed for a replica since a version that it has; 0 for everything."""
        if since > self.version:  # a version of another life
            since = 0
        shares = []
        for tenant in reversed(self._changed):
            if self._changed[tenant] <= since:
                break
            shares.append(self._share(tenant, replica, epoch))
        return Answer(version=self.version, shares=shares)

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
            self._note_presence(replica, self.ledger.present(replica), lifts=False)
        for tenant in self.counters.tenants:
            self._touch(tenant)

    def check(self) -> None:
        """Assert what always holds; O(n)."""
        self.ledger.check()
        self.counters.check()

    def _note_presence(self, replica: str, lines: Mapping[Account, AccountReport], *, lifts: bool = True) -> None:
        for account, line in lines.items():
            if account.tenant == SYSTEM:
                continue
            waiting, running = line.num_waiting > 0, line.num_running > 0
            self.counters.set_present(account, replica, waiting=waiting, running=running, lifts=lifts)
            self._reserve(replica, account, line.reserved)
            self._touch(account.tenant)

    def _reserve(self, replica: str, account: Account, reserved: float) -> None:
        accounts = self._reserved.setdefault(replica, {})
        change = reserved - accounts.pop(account, 0.0)
        if reserved:
            accounts[account] = reserved
        if change:
            tenant = account.tenant
            _add(self._reserved_at, (tenant, replica), change)
            _add(self._reserved_of, tenant, change)

    def _touch(self, tenant: str) -> None:
        self._changed[tenant] = self.version
        self._changed.move_to_end(tenant)
        if len(self._changed) > 2 * len(self.counters.tenants) + SPARE_ENTRIES:
            kept = ((name, version) for name, version in self._changed.items() if name in self.counters.tenants)
            self._changed = OrderedDict(
                kept
            )  # whoever was forgotten is told anew when it returns, and its weight with it

    def _share(self, tenant: str, replica: str, epoch: str) -> Share:
        tenants, users = self.counters.tenants, self.counters.users(tenant)
        weight = tenants.weight(tenant)
        elsewhere = self._reserved_of.get(tenant, 0.0) - self._reserved_at.get((tenant, replica), 0.0)
        known = Known(
            counter=tenants.counter(tenant) + elsewhere / weight,
            included=self.unit.service(self.ledger.total_of_tenant(replica, epoch, tenant)),
        )
        share = Share(tenant=tenant, known=known, weight=weight, waits=tenants.is_waiting(tenant))
        if len(users) > 1:
            for user in users:
                included = self.unit.service(self.ledger.total(replica, epoch, Account(tenant, user)))
                share.users[user] = Known(counter=users.counter(user), included=included)
        return share


K = TypeVar("K")


def _add(sums: dict[K, float], key: K, change: float) -> None:
    """Add to a sum; one that is nothing is dropped. Engines reserve fractions of 2, whose sums are exact."""
    total = sums.get(key, 0.0) + change
    if total > 0.0:
        sums[key] = total
    else:
        sums.pop(key, None)
