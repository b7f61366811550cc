"""What the replicas of a pool report, and what they are told: ledger and counters as one object; no clock, no network.

Rules:
- A report is merged, what it adds is charged, then who waits and runs where is noted: in this order, so that nobody is
  lifted by service that it had before.
- An answer is absolute: per account its counter, what of the asking replica's own totals is in it, and whether it waits
  elsewhere. An answer may be lost or repeated; a replica adds what it has served beyond.
- A new epoch of a replica takes the old one's place: nobody waits or runs there any more but those whom it names.
- Answers hold what changed since the version that the replica has; a replica of another life has none and gets all.
- Of tenants that wait or run at a replica, or that its report names, it is told in every answer. Of the absent it is told at
  once while few of them change, else in every `ABSENT_EVERY`th answer: whoever comes then is ordered by what was known of it
  so many intervals ago, until the next answer. So an answer is as large as a replica is, and not as the cluster.
- A stored state says who waits where, too: nobody is lifted because the scheduler was away. Totals since then are charged:
  nothing is lost and nothing counts twice, however old it is.
- After a loss of all state, the first reports carry what each replica knew of the counters: the highest word is taken, and
  the totals of that report are a beginning, not a charge. So at most the others' service since their last answer is lost.
"""

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from cost_service.charges import MAX_COUNT, NOTHING, SYSTEM, Account, ServiceUnit
from cost_service.lowest import SPARE_ENTRIES
from cost_service.service_messages import UNTOLD, AccountReport, Answer, Known, Report, Share, Version
from global_scheduler.counters import FairCounters
from global_scheduler.epoch import Epoch
from global_scheduler.ledger import ABSENT, NO_EPOCH, Ledger

ABSENT_EVERY = 20
"""Answers from one that tells of all who are absent to the next such."""

MAX_ABSENT = 256
"""Absent tenants that any answer may tell of."""


@dataclass(slots=True)
class _Told:
    """What a replica was told of absent tenants."""

    version: int = 0
    num_since: int = 0
    """Answers since."""

    heard: int = 0
    """The version that it is known to have."""


class FairShare:
    """Fairness state of one pool."""

    def __init__(self, counters: FairCounters | None = None, unit: ServiceUnit | None = None) -> None:
        self.counters = counters or FairCounters()
        self.unit = unit or ServiceUnit()
        self.ledger = Ledger()
        self.version = 0
        self._restored = False
        self._changed: dict[str, int] = {}  # tenants by the version of their last change
        self._most_changed = SPARE_ENTRIES
        self._told: dict[str, _Told] = {}  # by replica
        self._words: dict[str, Share] = {}  # what replicas are told that have served nothing of a tenant
        self._reserved: dict[str, dict[Account, float]] = {}  # service by replica
        self._reserved_at: dict[tuple[str, str], float] = {}  # sums by tenant and replica
        self._reserved_of: dict[str, float] = {}  # sums by tenant

    def add_replica(self, replica: str) -> None:
        """Expect reports of a replica."""
        self.ledger.add_replica(replica)

    def remove_replica(self, replica: str) -> None:
        """Nobody waits or runs there any more, and what was reserved there will not be served."""
        touched = dict.fromkeys(account.tenant for account in self.ledger.present(replica))
        self.ledger.remove_replica(replica)
        self.counters.remove_replica(replica)
        self.lose_touch(replica)
        for account in list(self._reserved.get(replica, ())):
            self._reserve(replica, account, 0.0)
        self._reserved.pop(replica, None)
        self._touch(touched)

    def lose_touch(self, replica: str) -> None:
        """Keep nothing for a replica that does not ask any more; should it be back, it has no version."""
        self._told.pop(replica, None)

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

    @property
    def num_changed(self) -> int:
        """Tenants that a replica may have to hear of."""
        return len(self._changed)

    def answer(self, replica: str, epoch: str, *, since: Version, named: Iterable[Account] = ()) -> Answer:
        """Return what has changed for a replica since a version that it has.

        Args:
            named: Accounts in its last report.
        """
        if max(since) > self.version:  # a version of another life
            since = UNTOLD
        names = self._changed_at(replica, named, since.present)
        absent = self._changed_elsewhere(replica, names, since.absent)
        version = Version(self.version, since.absent if absent is None else self.version)
        return Answer(version=version, shares=self._shares(names | (absent or {}), replica, epoch))

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

    def _changed_at(self, replica: str, named: Iterable[Account], since: int) -> dict[str, None]:
        """Tenants that have changed since a version and are at a replica, or are named."""
        changed, present = self._changed, self.ledger.present(replica)
        names = dict.fromkeys(account.tenant for account in named)
        if 4 * len(present) < len(changed):
            names |= dict.fromkeys(account.tenant for account in present)
        else:  # the shorter way
            places_of = self.counters.tenants.places_of
            names |= {name: None for name in self._recent(since) if replica in places_of(name)}
        return {name: None for name in names if changed.get(name, 0) > since}

    def _changed_elsewhere(self, replica: str, here: Container[str], since: int) -> dict[str, None] | None:
        """All others that have changed since a version; None if it is not the time to tell of so many."""
        told = self._told.setdefault(replica, _Told())
        told.heard = since or self.version  # who has nothing is told all that there is
        told.num_since += 1
        is_time = since == 0 or since < told.version or told.num_since >= ABSENT_EVERY  # or the last word was lost
        others = (name for name in self._recent(since) if name not in here)
        names = dict.fromkeys(others if is_time else islice(others, MAX_ABSENT + 1))
        if not is_time and len(names) > MAX_ABSENT:
            return None
        told.version, told.num_since = self.version, 0
        return names

    def _recent(self, since: int) -> Iterator[str]:
        """Tenants that have changed since a version, the last that changed first."""
        for name, version in reversed(self._changed.items()):
            if version <= since:
                return
            yield name

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
            self._words.pop(tenant, None)
        if len(changed) > self._most_changed:
            self._drop_changes()

    def _drop_changes(self) -> None:
        """Drop the changes of tenants that are forgotten, once every replica has heard that they wait no more.

        Whoever was forgotten is told anew when it returns, and its weight with it.
        """
        heard, tenants = min((told.heard for told in self._told.values()), default=self.version), self.counters.tenants
        self._changed = {name: at for name, at in self._changed.items() if at > heard or name in tenants}
        self._words = {name: share for name, share in self._words.items() if name in self._changed}
        self._most_changed = 2 * len(self._changed) + SPARE_ENTRIES

    def _shares(self, names: Iterable[str], replica: str, epoch: str) -> list[Share]:
        """What a replica is told of tenants; for thousands of them in a second, so a word is made once for all replicas."""
        totals, reserved_at, words = self.ledger.epoch(replica, epoch), self._reserved_at, self._words
        shares = []
        for name in names:
            if name in totals.tenants or (name, replica) in reserved_at:
                shares.append(self._share(name, totals, reserved_at.get((name, replica), 0.0)))
            else:
                if name not in words:
                    words[name] = self._share(name, NO_EPOCH, 0.0)
                shares.append(words[name])
        return shares

    def _share(self, name: str, totals: Epoch, reserved: float) -> Share:
        """What a replica is told of a tenant, of whom it has served and reserved so much itself."""
        tenants, service = self.counters.tenants, self.unit.service
        counter, weight = tenants.counter(name), tenants.weight(name)
        if name in self._reserved_of:
            counter += (self._reserved_of[name] - reserved) / weight
        known = Known(counter=counter, included=service(totals.tenants.get(name, NOTHING)))
        share = Share(tenant=name, known=known, weight=weight, waits=tenants.is_waiting(name))
        users = self.counters.several_users(name)
        if users is not None and len(users) > 1:
            for user in users:
                included = service(totals.totals.get(Account(name, user), NOTHING))
                share.users[user] = Known(counter=users.counter(user), included=included)
        return share


def absent_s(num_tenants: int, between_s: float) -> float:
    """Seconds beyond an answer until a replica has heard of a change of who is absent there.

    Args:
        num_tenants: That may have changed.
        between_s: From an answer to the next.
    """
    return 0.0 if num_tenants <= MAX_ABSENT else (ABSENT_EVERY - 1) * between_s


K = TypeVar("K")


def _add(sums: dict[K, float], key: K, change: float) -> None:
    """Add to a sum; one that is nothing is dropped. Engines reserve fractions of 2, whose sums are exact."""
    total = sums.get(key, 0.0) + change
    if total > 0.0:
        sums[key] = total
    else:
        sums.pop(key, None)
